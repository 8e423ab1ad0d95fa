// The model of the package in plain JavaScript: its parts from half precision, its tokenizer, its forward pass.
// One namespace, `metakeEdit`, holds all files of the page; the data arrive as scripts that call `metakeEditData`.
window.metakeEdit = window.metakeEdit || {};
(() => {
  const parts = {};

  // Half precision to numbers: sign, five bits of exponent, ten of mantissa; all 65,536 of them once.
  const halves = new Float32Array(65536);
  for (let i = 0; i < 65536; i++) {
    const exponent = (i >> 10) & 31, mantissa = i & 1023;
    const size = exponent ? 2 ** (exponent - 15) * (1 + mantissa / 1024) : 2 ** -14 * (mantissa / 1024);
    halves[i] = i & 32768 ? -size : size;
  }

  const bytes = (base64) => {
    const text = atob(base64), found = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) found[i] = text.charCodeAt(i);
    return found;
  };

  // A part has arrived: its header as it is, its tensors by name as rows of single precision.
  window.metakeEditData = (name, header, base64) => {
    const raw = bytes(base64), tensors = {};
    for (const [label, kind, shape, start] of header.tensors) {
      const count = shape.reduce((a, b) => a * b, 1);
      const view = { f16: Uint16Array, i8: Int8Array, f32: Float32Array }[kind];
      const own = new view(raw.buffer, start, count);
      const values = new Float32Array(own);
      if (kind === "f16") for (let i = 0; i < count; i++) values[i] = halves[own[i]];
      tensors[label] = Object.assign(values, { shape });
    }
    parts[name] = { ...header, tensors };
  };

  // Fetch a part once, as a script: a page that is opened from the disk may read nothing else.
  const asked = {};
  const part = (name) => asked[name] ||= new Promise((done, failed) => {
    const tag = document.createElement("script");
    tag.src = `${metakeEdit.folder}${name}-data.js`;
    tag.onload = () => (parts[name] ? done(parts[name]) : failed(new Error(`${name}-data.js is not whole`)));
    tag.onerror = () => failed(new Error(`${name}-data.js was not found beside the page`));
    document.head.append(tag);
  });

  // Byte-level byte-pair encoding, as GPT-2 has it.
  const WORDS = /'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;
  const letters = [];  // byte → the letter that stands for it in tokens
  for (let i = 0, next = 256; i < 256; i++) {
    const shown = (i > 32 && i < 127) || (i > 160 && i < 173) || i > 173;
    letters[i] = String.fromCodePoint(shown ? i : next++);
  }
  const bytesOf = new Map(letters.map((letter, i) => [letter, i]));

  class Tokenizer {
    constructor({ tokens, merges }) {
      this.tokens = tokens;
      this.ids = new Map(tokens.map((token, i) => [token, i]));
      this.ranks = new Map(merges.map((pair, i) => [pair, i]));
    }

    encode(text) {
      const found = [];
      for (const word of text.match(WORDS) || []) {
        const pieces = [...new TextEncoder().encode(word)].map((byte) => letters[byte]);
        for (;;) {
          let best = -1, rank = Infinity;
          for (let i = 0; i + 1 < pieces.length; i++) {
            const own = this.ranks.get(`${pieces[i]} ${pieces[i + 1]}`) ?? Infinity;
            if (own < rank) [best, rank] = [i, own];
          }
          if (best < 0) break;
          const pair = [pieces[best], pieces[best + 1]];
          for (let i = 0; i + 1 < pieces.length; i++) {
            if (pieces[i] === pair[0] && pieces[i + 1] === pair[1]) pieces.splice(i, 2, pair.join(""));
          }
        }
        for (const piece of pieces) found.push(this.ids.get(piece));
      }
      return found;
    }

    word(id) {
      const raw = Uint8Array.from([...this.tokens[id]], (letter) => bytesOf.get(letter) ?? 63);
      return new TextDecoder().decode(raw);
    }
  }

  // rows (count × width of `weight`) times weightᵀ plus bias: (count × outputs). Four rows and two outputs at a time
  // share what is read; where rows are missing to four, the last one is taken again.
  const product = (rows, count, weight, bias) => {
    const [outputs, width] = weight.shape, out = new Float32Array(count * outputs);
    if (count === 1) return single(rows, weight, bias, out);
    for (let r = 0; r < count; r += 4) {
      const place = (i) => Math.min(r + i, count - 1), [a, b, c, d] = [0, 1, 2, 3].map((i) => place(i) * width);
      const [i, j, m, n] = [0, 1, 2, 3].map((k) => place(k) * outputs);
      for (let o = 0, w = 0; o < outputs; o += 2, w += 2 * width) {
        const z = w + width;
        let s = bias[o], t = s, u = s, v = s, S = bias[o + 1], T = S, U = S, V = S;
        for (let k = 0; k < width; k++) {
          const x = weight[w + k], y = weight[z + k], e = rows[a + k], f = rows[b + k], g = rows[c + k], h = rows[d + k];
          s += x * e; t += x * f; u += x * g; v += x * h;
          S += y * e; T += y * f; U += y * g; V += y * h;
        }
        out[i + o] = s; out[i + o + 1] = S; out[j + o] = t; out[j + o + 1] = T;
        out[m + o] = u; out[m + o + 1] = U; out[n + o] = v; out[n + o + 1] = V;
      }
    }
    return out;
  };
  const single = (row, weight, bias, out) => {
    const [outputs, width] = weight.shape;
    for (let o = 0, w = 0; o < outputs; o += 2, w += 2 * width) {
      let s = bias[o], t = bias[o + 1];
      for (let k = 0; k < width; k++) { s += weight[w + k] * row[k]; t += weight[w + width + k] * row[k]; }
      out[o] = s; out[o + 1] = t;
    }
    return out;
  };

  const normalized = (rows, count, width, weight, bias, small) => {
    const out = new Float32Array(rows.length);
    for (let r = 0; r < count; r++) {
      const at = r * width;
      let mean = 0, square = 0;
      for (let k = 0; k < width; k++) mean += rows[at + k];
      mean /= width;
      for (let k = 0; k < width; k++) square += (rows[at + k] - mean) ** 2;
      const scale = 1 / Math.sqrt(square / width + small);
      for (let k = 0; k < width; k++) out[at + k] = (rows[at + k] - mean) * scale * weight[k] + bias[k];
    }
    return out;
  };

  const gelu = (x) => {  // "gelu_new", the tanh form
    for (let i = 0; i < x.length; i++) {
      x[i] *= 0.5 * (1 + Math.tanh(0.7978845608028654 * (x[i] + 0.044715 * x[i] ** 3)));
    }
    return x;
  };

  const last = (rows, width) => rows.subarray(rows.length - width);

  class Model {
    constructor(data) {
      this.data = data;
      this.sizes = data.sizes;
      this.tokenizer = new Tokenizer(data);
    }

    tensor(name) {
      return this.data.tensors[name];
    }

    // Residual stream below the first block, (tokens × width).
    embedded(ids) {
      const { width, window } = this.sizes, out = new Float32Array(ids.length * width);
      if (ids.length > window) throw new Error(`${ids.length} tokens; this model has room for ${window}`);
      const [words, places] = [this.tensor("embedding"), this.tensor("position")];
      ids.forEach((id, i) => {
        for (let k = 0; k < width; k++) out[i * width + k] = words[id * width + k] + places[i * width + k];
      });
      return out;
    }

    // A block up to its MLP's last map: the keys (what that map reads) and the stream that its output is added to.
    // end: at the last token alone.
    keys(layer, stream, end = false) {
      const { width, small } = this.sizes, count = stream.length / width;
      const own = (name) => [this.tensor(`${layer}.${name}.weight`), this.tensor(`${layer}.${name}.bias`)];
      const qkv = product(normalized(stream, count, width, ...own("norm1"), small), count, ...own("qkv"));
      const first = end ? count - 1 : 0, rows = count - first;
      const base = product(this.attended(qkv, count, first), rows, ...own("out"));
      for (let i = 0; i < base.length; i++) base[i] += stream[first * width + i];
      const read = normalized(base, rows, width, ...own("norm2"), small);
      return { base, keys: gelu(product(read, rows, ...own("inner"))) };
    }

    // Causal attention of the tokens from `first` on.
    attended(qkv, count, first) {
      const { width, heads } = this.sizes, size = width / heads, out = new Float32Array((count - first) * width);
      const scores = new Float64Array(count), step = 3 * width;
      for (let h = 0; h < heads; h++) {
        for (let t = first; t < count; t++) {
          const q = t * step + h * size, to = (t - first) * width + h * size;
          let most = -Infinity, sum = 0;
          for (let s = 0; s <= t; s++) {
            const k = s * step + width + h * size;
            let score = 0;
            for (let i = 0; i < size; i++) score += qkv[q + i] * qkv[k + i];
            most = Math.max(most, scores[s] = score / Math.sqrt(size));
          }
          for (let s = 0; s <= t; s++) sum += scores[s] = Math.exp(scores[s] - most);
          for (let s = 0; s <= t; s++) {
            const v = s * step + 2 * width + h * size, share = scores[s] / sum;
            for (let i = 0; i < size; i++) out[to + i] += share * qkv[v + i];
          }
        }
      }
      return out;
    }

    // What the edited map puts out: W k + b, and what each update of this layer adds, R (M · k).
    written(layer, keys, updates = []) {
      const { inner, width } = this.sizes, count = keys.length / inner;
      const out = product(keys, count, this.tensor(`${layer}.write.weight`), this.tensor(`${layer}.write.bias`));
      for (const { residual, gate } of updates.filter((update) => update.layer === layer)) {
        for (let r = 0; r < count; r++) {
          let share = 0;
          for (let k = 0; k < inner; k++) share += gate[k] * keys[r * inner + k];
          for (let k = 0; k < width; k++) out[r * width + k] += residual[k] * share;
        }
      }
      return out;
    }

    // A whole block; the stream after it.
    block(layer, stream, updates, end = false) {
      const { base, keys } = this.keys(layer, stream, end), out = this.written(layer, keys, updates);
      for (let i = 0; i < out.length; i++) out[i] += base[i];
      return out;
    }

    // Probabilities of every token to come next after a text, with these updates in place.
    next(text, updates = []) {
      const { width, depth, small } = this.sizes;
      let stream = this.embedded(this.tokenizer.encode(text));
      for (let layer = 0; layer < depth; layer++) stream = this.block(layer, stream, updates, layer === depth - 1);
      const state = normalized(last(stream, width), 1, width, this.tensor("final.weight"), this.tensor("final.bias"), small);
      const words = this.tensor("embedding"), logits = product(state, 1, words, new Float32Array(words.shape[0]));
      const most = logits.reduce((a, b) => Math.max(a, b)), shares = logits.map((x) => Math.exp(x - most));
      const sum = shares.reduce((a, b) => a + b, 0);
      return shares.map((x) => x / sum);
    }
  }

  Object.assign(metakeEdit, { part, Model, last });
})();
