// Keys, gate and update of one request, as the library computes them: Δ = R·M, M = Qk / (ν + kᵀQk).
// Numbers are those of metake/editing/editor.py and metake/algebra/solve.py; the tests compare them.
(() => {
  const dot = (a, b) => { let sum = 0; for (let i = 0; i < a.length; i++) sum += a[i] * b[i]; return sum; };
  const norm = (a) => Math.sqrt(dot(a, a));

  // P k: onto the directions that ordinary text hardly uses. What is kept of P is the thinner of its two sides.
  const project = (tensors, layer, key) => {
    const inside = tensors[`${layer}.null`], side = inside || tensors[`${layer}.kept`], [rank, width] = side.shape;
    let out = Float64Array.from(key);
    for (let turn = 0; turn < (inside ? 1 : 2); turn++) {  // twice, as a small rest of a long key has its rounding
      const along = new Float64Array(width);
      for (let r = 0; r < rank; r++) {
        const row = side.subarray(r * width, (r + 1) * width), share = dot(row, out);
        for (let k = 0; k < width; k++) along[k] += share * row[k];
      }
      out = inside ? along : out.map((x, k) => x - along[k]);
    }
    return out;
  };

  // C⁻¹ k by two triangular solves with the Cholesky factor, whose rows stand one after the other.
  const inverted = (tensors, layer, key) => {
    const rows = tensors[`${layer}.factor`], width = key.length, out = Float64Array.from(key);
    const at = (r) => (r * (r + 1)) / 2;
    for (let r = 0; r < width; r++) {
      let sum = out[r];
      for (let k = 0; k < r; k++) sum -= rows[at(r) + k] * out[k];
      out[r] = sum / rows[at(r) + r];
    }
    for (let r = width - 1; r >= 0; r--) {
      out[r] /= rows[at(r) + r];
      for (let k = 0; k < r; k++) out[k] -= rows[at(r) + k] * out[r];
    }
    return out;
  };

  // Q k of a method at λ: P/λ, or (λC)⁻¹; ROME's exact write does not depend on λ.
  const metric = (method, strength, data, covariance) => {
    const scaled = (make, size) => (layer, key) => make(layer, key).map((x) => x / size);
    if (method === "rome") return scaled((layer, key) => inverted(covariance.tensors, layer, key), 1);
    if (method === "memit") return scaled((layer, key) => inverted(covariance.tensors, layer, key), strength);
    return scaled((layer, key) => project(data.tensors, layer, key), strength);
  };

  // How a key is averaged over the contexts: ROME's flat, the others' half for the plain prompt.
  const average = (keys, flat) => {
    const out = new Float64Array(keys[0].length);
    keys.forEach((key, i) => {
      const weight = flat || keys.length === 1 ? 1 / keys.length : i ? 0.5 / (keys.length - 1) : 0.5;
      for (let k = 0; k < out.length; k++) out[k] += weight * key[k];
    });
    return out;
  };

  // Every context's prompt, cut after the subject's last token; the plain prompt first.
  const rows = (model, contexts, prompt, subject) => contexts.map((context) => {
    const text = context.replace("{}", prompt), [before, after] = text.split("{}");
    const upto = model.tokenizer.encode(before + subject), whole = model.tokenizer.encode(before + subject + after);
    if (upto.some((id, i) => id !== whole[i])) {
      throw new Error(`“${subject}” ends inside a token; put a space or a comma after it`);
    }
    return upto;
  });

  // All layers of a method, each on the model that the layers before have changed: what the editor's one pipeline does.
  // plan: r, or null for keys and γ alone. Returns what each layer found, and the updates.
  const solve = (model, request, method, strength, plan, covariance) => {
    const { layers, contexts } = model.data.methods[method], { width, inner } = model.sizes, flat = method === "rome";
    const apply = metric(method, strength, model.data, covariance), end = layers[layers.length - 1], updates = [];
    let streams = rows(model, contexts, request.prompt, request.subject).map((ids) => model.embedded(ids));
    for (let layer = 0; layer < layers[0]; layer++) streams = streams.map((stream) => model.block(layer, stream, []));
    const found = [];
    let value = null, anchor = null;
    layers.forEach((layer, index) => {
      const read = streams.map((stream) => model.keys(layer, stream, layer === end));
      const keys = read.map((one) => metakeEdit.last(one.keys, inner));
      const key = average(keys, flat), metricKey = apply(layer, key), at = flat ? keys[0] : key;
      const gamma = dot(metricKey, at), noise = flat ? 0 : 1, gate = metricKey.map((x) => x / (noise + gamma));
      // what stands at the place of the plan now: the last layer's output, or, with ROME, what the map itself puts out
      let stream = streams[0];
      for (let i = layer; i <= end && !flat; i++) stream = model.block(i, stream, updates, i === end);
      const current = flat ? model.written(layer, keys[0], updates) : metakeEdit.last(stream, width);
      anchor ||= current;
      if (plan) value ||= current.map((x, k) => x + plan[k]);
      const residual = plan && value.map((x, k) => (x - current[k]) / (layers.length - index));
      if (plan) updates.push({ layer, residual, gate });
      found.push({ layer, key, gamma, beta: gamma / (noise + gamma), residual: plan ? norm(residual) : 0 });
      if (layer !== end) {
        streams = read.map(({ base, keys: own }) => model.written(layer, own, updates).map((x, k) => x + base[k]));
      }
    });
    return { layers: found, updates, anchor: norm(anchor), end };
  };

  // γ, β and the feasible interval at the last edited layer of the unedited model (MetaKE v3, Theorem 1): a plan r
  // shorter than τ/β does not succeed, one longer than ε(1+γ) leaves more unwritten than is tolerated.
  const SHARE = 0.25;  // τ and ε as shares of ‖h‖, as `metake diagnose` has them
  const diagnose = (model, request, method, strength, covariance) => {
    const { layers, contexts } = model.data.methods[method], { width, inner } = model.sizes, flat = method === "rome";
    const end = layers[layers.length - 1];
    let streams = rows(model, contexts, request.prompt, request.subject).map((ids) => model.embedded(ids));
    for (let layer = 0; layer < end; layer++) streams = streams.map((stream) => model.block(layer, stream, []));
    const read = streams.map((stream) => model.keys(end, stream, true));
    const keys = read.map((one) => metakeEdit.last(one.keys, inner));
    const out = model.written(end, keys[0]), key = average(keys, flat);
    const size = norm(flat ? out : out.map((x, k) => x + metakeEdit.last(read[0].base, width)[k]));
    return { end, key, plain: keys[0], size, ...feasible(model, method, strength, key, keys[0], size, end, covariance) };
  };
  const feasible = (model, method, strength, key, plain, size, end, covariance) => {
    const exact = method === "rome", metricKey = metric(method, strength, model.data, covariance)(end, key);
    const gamma = dot(metricKey, exact ? plain : key), beta = exact ? 1 : gamma / (1 + gamma);
    return { gamma, beta, lower: (SHARE * size) / beta, upper: exact ? Infinity : SHARE * size * (1 + gamma) };
  };

  // The recorded plan of a pair: MetaKE's is Stage I's and what the refinement at this λ added.
  const planned = (data, place, method, strength) => {
    const vector = (name) => {
      const steps = data.tensors[`plan.${name}.steps`], scale = data.tensors[`plan.${name}.scale`][place];
      const width = steps.shape[1];
      return Float64Array.from(steps.subarray(place * width, (place + 1) * width), (x) => x * scale);
    };
    if (method === "rome") return vector("rome");
    const plan = vector("stage_one");
    if (method !== "metake") return plan;
    const refined = vector(`metake/${strength}`);
    return plan.map((x, k) => x + refined[k]);
  };

  Object.assign(metakeEdit, { solve, diagnose, feasible, planned, norm, SHARE });
})();
