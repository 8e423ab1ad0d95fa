// The picture of "Geometry of β": drag a key against what is preserved. Readings as in metake.algebra.solve, compared with it at load.
(() => {
  "use strict";

  // Q = unit/λ, conditioned on `past` equal keys p; γ = kᵀQk − m (kᵀQp)²/(1 + m pᵀQp); β = γ/(1+γ); τ/β ≤ ‖r‖ ≤ ε(1+γ).
  function reading(scene, at) {
    const unit = scene.constraints[at.method].unit;
    const form = (a, b) => (a[0] * (unit[0][0] * b[0] + unit[0][1] * b[1]) + a[1] * (unit[1][0] * b[0] + unit[1][1] * b[1])) / at.ridge;
    const key = [at.x, at.y], cross = form(key, scene.past);
    const gamma = Math.max(0, form(key, key) - (at.past * cross * cross) / (1 + at.past * form(scene.past, scene.past)));
    const beta = gamma / (1 + gamma), lower = at.tau / beta, upper = at.epsilon * (1 + gamma);
    return { gamma, beta, realized: beta * at.planned, unrealized: at.planned / (1 + gamma), lower, upper, feasible: lower <= upper };
  }

  // The largest relative difference to the library over its reference points; an endless bound is null there.
  function deviation(scene) {
    let worst = 0;
    for (const point of scene.reference) {
      const found = reading(scene, point);
      for (const name of ["gamma", "beta", "realized", "unrealized", "lower", "upper"]) {
        const own = found[name], given = point[name] === null ? Infinity : point[name];
        const off = own === given ? 0 : Math.abs(own - given) / Math.max(Math.abs(given), 1e-300);
        worst = Math.max(worst, Number.isNaN(off) ? Infinity : off);
      }
      if (found.feasible !== point.feasible && Math.abs(found.upper / found.lower - 1) > 1e-9) worst = Infinity; // not a tie
    }
    return scene.reference.length ? worst : Infinity;
  }

  if (typeof module === "object" && module.exports) module.exports = { reading, deviation };
  if (typeof document === "undefined") return;

  const SVG = "http://www.w3.org/2000/svg", SCALE = 50, REACH = 3, AXIS = 8, LEVELS = [0.25, 0.5, 0.75, 0.9];
  const root = document.getElementById("metake-geometry");
  if (!root || root.dataset.live) return;
  root.dataset.live = "yes";
  const scene = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  const state = { ...scene.start };

  function make(tag, attributes = {}, parent = null, text = null) {
    const drawn = ["svg", "g", "line", "circle", "path", "rect", "text", "polygon", "clipPath", "defs", "pattern"].includes(tag);
    const node = drawn ? document.createElementNS(SVG, tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== null) node.textContent = text;
    if (parent) parent.appendChild(node);
    return node;
  }
  const set = (node, attributes) => Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value));
  const fixed = (value, digits = 2) => (!Number.isFinite(value) ? "∞" : value !== 0 && (value < 0.01 || value >= 1000) ? value.toPrecision(2) : value.toFixed(digits));
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  const live = root.querySelector(".mg-live"), pictures = make("div", { class: "mg-pictures" }, live);

  // The plane of keys. y points up.
  const plane = make("svg", { viewBox: "-165 -165 330 330", role: "group", "aria-label": "Plane of keys: the horizontal line is preserved" }, pictures);
  const clip = make("clipPath", { id: "mg-clip" }, make("defs", {}, plane));
  make("rect", { x: -160, y: -160, width: 320, height: 320 }, clip);
  make("rect", { x: -160, y: -160, width: 320, height: 320, class: "mg-frame" }, plane);
  const inside = make("g", { "clip-path": "url(#mg-clip)" }, plane);
  make("line", { x1: -160, y1: 0, x2: 160, y2: 0, class: "mg-preserved" }, inside);
  const levels = LEVELS.map((level) => ({ level, path: make("path", { class: "mg-level" }, inside), label: make("text", { class: "mg-small" }, inside, `β = ${level}`) }));
  for (const [x, y] of scene.preserved) make("circle", { cx: x * SCALE, cy: -y * SCALE, r: 2.5, class: "mg-dot" }, inside);
  make("text", { x: -155, y: 22, class: "mg-small" }, plane, "preserved keys");
  const past = make("g", {}, inside), [px, py] = scene.past;
  make("polygon", { points: `${px * SCALE},${-py * SCALE - 6} ${px * SCALE + 6},${-py * SCALE} ${px * SCALE},${-py * SCALE + 6} ${px * SCALE - 6},${-py * SCALE}`, class: "mg-past" }, past);
  const pastLabel = make("text", { x: px * SCALE + 9, y: -py * SCALE + 4, class: "mg-small" }, past);
  const drop = make("line", { class: "mg-drop" }, inside), part = make("line", { x1: 0, y1: 0, x2: 0, class: "mg-part" }, inside);
  const partLabel = make("text", { class: "mg-small", "text-anchor": "end" }, inside, "Pk");
  const arrow = make("line", { x1: 0, y1: 0, class: "mg-key" }, inside);
  const handle = make("g", { tabindex: 0, role: "slider", "aria-label": "The key, by arrow keys", "aria-valuemin": -180, "aria-valuemax": 180, class: "mg-handle" }, plane);
  make("circle", { r: 22, class: "mg-hit" }, handle);
  make("circle", { r: 8, class: "mg-knob" }, handle);
  const keyLabel = make("text", { class: "mg-label" }, plane, "k");

  // The plan, and the norms that are feasible, on one axis.
  const bars = make("svg", { viewBox: "0 0 330 210", role: "img" }, pictures), X = (value) => 12 + (306 * clamp(value, 0, AXIS)) / AXIS;
  const hatch = make("pattern", { id: "mg-hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" }, make("defs", {}, bars));
  make("line", { x1: 0, y1: 0, x2: 0, y2: 6, class: "mg-hatch" }, hatch);
  const planText = make("text", { x: 12, y: 16, class: "mg-label" }, bars);
  const bracket = make("path", { class: "mg-mark" }, bars), bracketText = make("text", { class: "mg-small", "text-anchor": "middle" }, bars);
  const realized = make("rect", { y: 44, height: 24, class: "mg-realized" }, bars), unrealized = make("rect", { y: 44, height: 24, class: "mg-unrealized" }, bars);
  const tau = make("path", { class: "mg-mark" }, bars), tauText = make("text", { y: 92, class: "mg-small", "text-anchor": "middle" }, bars);
  const spanText = make("text", { x: 12, y: 122, class: "mg-label" }, bars);
  make("line", { x1: X(0), x2: X(AXIS), y1: 142, y2: 142, class: "mg-axis" }, bars);
  const span = make("rect", { y: 132, height: 20, class: "mg-span" }, bars), ends = make("path", { class: "mg-mark" }, bars);
  const planned = make("line", { y1: 38, y2: 172, class: "mg-planned" }, bars);
  make("line", { x1: X(0), x2: X(AXIS), y1: 172, y2: 172, class: "mg-axis" }, bars);
  for (let value = 0; value <= AXIS; value += 2) make("text", { x: X(value), y: 187, dx: value === AXIS ? 8 : 0, class: "mg-small", "text-anchor": value === AXIS ? "end" : "middle" }, bars, value === AXIS ? `≥ ${value}` : `${value}`);
  make("text", { x: 165, y: 203, class: "mg-small", "text-anchor": "middle" }, bars, "norm of the residual");

  const numbers = make("dl", { class: "mg-numbers" }, live), shown = {};
  for (const [name, label] of [["angle", "angle to the preserved line"], ["gamma", "association γ"], ["beta", "realized share β"], ["success", "success: realized ≥ τ"], ["editability", "editability: unrealized ≤ ε"]]) {
    const cell = make("div", {}, numbers);
    make("dt", {}, cell, label);
    shown[name] = make("dd", {}, cell);
  }
  const spoken = make("p", { class: "mg-spoken", "aria-live": "polite" }, live);

  const choice = make("fieldset", { class: "mg-choice" }, live), radios = {};
  make("legend", {}, choice, "Constraint");
  for (const [method, constraint] of Object.entries(scene.constraints)) {
    const label = make("label", {}, choice);
    radios[method] = make("input", { type: "radio", name: "mg-constraint", value: method }, label);
    label.append(` ${constraint.name}`);
    radios[method].addEventListener("change", () => show({ method, ridge: constraint.ridge }));
  }
  const direction = () => (Math.atan2(state.y, state.x) * 180) / Math.PI, long = () => Math.hypot(state.x, state.y);
  const polar = (degrees, length) => ({ x: length * Math.cos((degrees * Math.PI) / 180), y: length * Math.sin((degrees * Math.PI) / 180) });
  const SLIDERS = [
    ["direction of the key", -180, 180, 1, () => direction(), (v) => polar(v, long()), (v) => `${v.toFixed(0)}°`],
    ["length of the key ‖k‖", 0.1, REACH, 0.01, () => long(), (v) => polar(direction(), v), (v) => fixed(v)],
    ["ridge λ (weight of C for MEMIT)", -2, 2, 0.01, () => Math.log10(state.ridge), (v) => ({ ridge: 10 ** v }), (v) => fixed(10 ** v)],
    ["remembered past keys", 0, 8, 1, () => state.past, (v) => ({ past: v }), (v) => `${v}`],
    ["planned norm ‖r‖", 0.1, AXIS, 0.01, () => state.planned, (v) => ({ planned: v }), (v) => fixed(v)],
    ["τ: norm that success needs", 0.1, 4, 0.01, () => state.tau, (v) => ({ tau: v }), (v) => fixed(v)],
    ["ε: unrealized norm tolerated", 0.1, 4, 0.01, () => state.epsilon, (v) => ({ epsilon: v }), (v) => fixed(v)],
  ];
  const sliders = make("div", { class: "mg-sliders" }, live);
  const rows = SLIDERS.map(([name, min, max, step, get, change, text], i) => {
    const row = make("div", {}, sliders);
    const label = make("label", { for: `mg-slider-${i}` }, row, `${name} `), told = make("span", { class: "mg-value" }, row);
    const input = make("input", { type: "range", id: `mg-slider-${i}`, min, max, step }, row);
    input.addEventListener("input", () => show(change(Number(input.value))));
    return () => {
      const value = get();
      input.value = value;
      told.textContent = text(value);
      input.setAttribute("aria-valuetext", text(value));
    };
  });
  make("button", { type: "button", class: "mg-reset" }, live, "Start again").addEventListener("click", () => show({ ...scene.start }));

  // A level of β is where kᵀQk = γ: an ellipse under MEMIT, two parallel lines under AlphaEdit's projector.
  function level(beta) {
    const points = [];
    for (let i = 0; i <= 360; i++) {
      const at = polar(i, 1), length = Math.min(Math.sqrt(beta / (1 - beta) / reading(scene, { ...state, ...at }).gamma), 1e3);
      points.push(`${(length * at.x * SCALE).toFixed(2)} ${(-length * at.y * SCALE).toFixed(2)}`);
    }
    const up = Math.sqrt(beta / (1 - beta) / reading(scene, { ...state, x: 0, y: 1 }).gamma) * SCALE;
    return [`M${points.join("L")}Z`, up];
  }

  let speak = 0;
  function show(change) {
    Object.assign(state, change);
    const size = long();
    if (size > REACH) Object.assign(state, { x: (state.x * REACH) / size, y: (state.y * REACH) / size });
    const found = reading(scene, state), x = state.x * SCALE, y = -state.y * SCALE, projects = state.method === "alphaedit";
    root.style.setProperty("--mg-color", scene.constraints[state.method].color);
    for (const [method, radio] of Object.entries(radios)) radio.checked = method === state.method;
    let last = -Infinity; // labels that would cover each other are left out
    for (const line of levels) {
      const [path, up] = level(line.level), fits = up < 150 && up > last + 13;
      set(line.path, { d: path });
      set(line.label, { x: -155, y: -up - 3, visibility: fits && projects ? "visible" : "hidden" });
      if (!projects) set(line.label, { x: -18, y: -up - 3, visibility: fits ? "visible" : "hidden" });
      if (fits) last = up;
    }
    set(past, { visibility: state.past ? "visible" : "hidden" });
    pastLabel.textContent = `past × ${state.past}`;
    for (const node of [drop, part, partLabel]) set(node, { visibility: projects ? "visible" : "hidden" });
    set(drop, { x1: 0, y1: y, x2: x, y2: y });
    set(part, { y2: y });
    set(partLabel, { x: state.x < 0 ? 22 : -6, y: y / 2 + 4 });
    set(arrow, { x2: x, y2: y });
    set(handle, { transform: `translate(${x} ${y})` });
    set(keyLabel, { x: clamp(x + (x < 130 ? 13 : -22), -155, 150), y: clamp(y + (y < -140 ? 16 : -8), -150, 155) });
    const acute = (Math.asin(Math.min(1, Math.abs(state.y) / Math.max(long(), 1e-12))) * 180) / Math.PI;
    const success = found.realized >= state.tau, editable = found.unrealized <= state.epsilon;

    planText.textContent = `plan ${fixed(state.planned)}: realized ${fixed(found.realized)}, unrealized ${fixed(found.unrealized)}`;
    set(realized, { x: X(0), width: Math.max(X(found.realized) - X(0), 0) });
    set(unrealized, { x: X(found.realized), width: Math.max(X(state.planned) - X(found.realized), 0) });
    const from = X(Math.max(state.planned - state.epsilon, 0)), to = X(state.planned);
    set(bracket, { d: `M${from} 41V36H${to}V41` });
    set(bracketText, { x: clamp((from + to) / 2, 20, 310), y: 32 });
    bracketText.textContent = "ε";
    set(tau, { d: `M${X(state.tau)} 44V78` });
    set(tauText, { x: X(state.tau) });
    tauText.textContent = "τ";
    spanText.textContent = found.feasible ? `feasible: ${fixed(found.lower)} ≤ ‖r‖ ≤ ${fixed(found.upper)}` : `none: τ/β = ${fixed(found.lower)} > ε/(1−β) = ${fixed(found.upper)}`;
    set(span, { x: X(found.lower), width: found.feasible ? Math.max(X(found.upper) - X(found.lower), 1) : 0 });
    set(ends, { d: found.feasible ? "" : `M${X(found.upper) - 6} 132H${X(found.upper)}V152H${X(found.upper) - 6}M${X(found.lower) + 6} 132H${X(found.lower)}V152H${X(found.lower) + 6}` });
    set(planned, { x1: X(state.planned), x2: X(state.planned) });
    bars.setAttribute("aria-label", `${planText.textContent}; ${spanText.textContent}`);

    shown.angle.textContent = `${acute.toFixed(0)}°`;
    shown.gamma.textContent = fixed(found.gamma);
    shown.beta.textContent = fixed(found.beta);
    shown.success.textContent = success ? "yes" : "no";
    shown.editability.textContent = editable ? "yes" : "no";
    const said = `share realized ${fixed(found.beta)}, ${spanText.textContent}`;
    set(handle, { "aria-valuenow": Math.round(direction()), "aria-valuetext": `x ${fixed(state.x)}, y ${fixed(state.y)}; ${said}` });
    clearTimeout(speak);
    speak = setTimeout(() => (spoken.textContent = said), 600);
    rows.forEach((row) => row());
  }

  const place = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(plane.getScreenCTM().inverse());
    show({ x: at.x / SCALE, y: -at.y / SCALE });
  };
  handle.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    handle.setPointerCapture(event.pointerId);
    handle.focus();
  });
  handle.addEventListener("pointermove", (event) => handle.hasPointerCapture(event.pointerId) && place(event));
  const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  handle.addEventListener("keydown", (event) => {
    if (!STEPS[event.key]) return;
    event.preventDefault();
    const [dx, dy] = STEPS[event.key].map((direction) => direction * (event.shiftKey ? 0.25 : 0.05));
    show({ x: state.x + dx, y: state.y + dy });
  });

  const off = deviation(scene);
  const warning = root.querySelector(".mg-warning");
  if (off > scene.tolerance) {
    warning.textContent = `This picture disagrees with the library: its readings depart from the reference points by up to ${off.toExponential(1)}. Trust the table, not the picture.`;
    warning.hidden = false;
  }
  root.querySelector(".mg-plain").hidden = true;
  live.hidden = false;
  show({});
})();
