// What the page draws from numbers: bars of next tokens before and after, the feasible interval, in plain elements.
(() => {
  const make = (tag, given = {}, ...inside) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(given)) {
      if (name in element && typeof value !== "string") element[name] = value;
      else element.setAttribute(name, value);
    }
    element.append(...inside.filter((one) => one != null));
    return element;
  };

  // To the digits that mean something: three of a norm, two decimals of a probability.
  const number = (x) => (x === Infinity ? "∞" : x >= 100 ? x.toFixed(0) : x >= 10 ? x.toFixed(1) : x.toPrecision(2));
  const share = (p) => p.toFixed(2);

  // Which tokens a text's bars show: the present and the new answer, then the likeliest before and after.
  const chosen = (before, after, answers, count) => {
    const likeliest = (p) => [...p.keys()].sort((a, b) => p[b] - p[a]).slice(0, count);
    const mixed = [...answers, ...likeliest(before), ...(after ? likeliest(after) : [])];
    const some = [...new Set(mixed)].slice(0, Math.max(count, answers.length));
    return some.sort((a, b) => Math.max(after?.[b] ?? 0, before[b]) - Math.max(after?.[a] ?? 0, before[a]));
  };

  const bar = (p, kind) => {
    const inside = make("span", { class: `me-bar me-${kind}` });
    inside.style.width = `${(100 * p).toFixed(2)}%`;
    return inside;
  };

  // One text with its next tokens. marks: token → what it is ("new", "true").
  const distribution = (text, before, after, marks, word, count) => {
    const rows = chosen(before, after, [...marks.keys()], count).map((id) => make(
      "tr", { class: marks.has(id) ? `me-row me-is-${marks.get(id)}` : "me-row" },
      make("th", { scope: "row" }, make("span", { class: "me-word" }, word(id).trim() || "␣"),
        marks.has(id) ? make("small", {}, marks.get(id) === "new" ? " new" : " taught") : null),
      make("td", { class: "me-bars", "aria-hidden": "true" }, bar(before[id], "before"), after ? bar(after[id], "after") : null),
      make("td", { class: "me-number" }, share(before[id])),
      make("td", { class: "me-number me-later" }, after ? share(after[id]) : "–")
    ));
    const head = ["next token", null, "before", "after"].map((name) => (
      name === null ? make("td", { "aria-hidden": "true" }) : make("th", { scope: "col" }, name)
    ));
    return make("table", { class: "me-table" }, make("caption", {}, `“${text} …”`), make("thead", {}, make("tr", {}, ...head)),
      make("tbody", {}, ...rows));
  };

  // The feasible interval on a line of norms from 0.1 to 1000, each tenfold as wide as the other, and the plan on it.
  const LEAST = 0.1, MOST = 1000;
  const place = (x) => 100 * Math.min(1, Math.max(0, Math.log(x / LEAST) / Math.log(MOST / LEAST)));
  const interval = ({ lower, upper }, plan) => {
    const line = make("div", { class: "me-line", "aria-hidden": "true" });
    const put = (kind, from, to, text) => {
      const one = make("span", { class: kind }, text || "");
      one.style.left = `${place(from)}%`;
      if (to !== null) one.style.width = `${place(to) - place(from)}%`;
      line.append(one);
    };
    if (lower <= upper) put("me-span", lower, upper);
    else {
      put("me-end me-lower", lower, null);
      put("me-end me-upper", upper, null);
    }
    for (let tick = LEAST; tick <= MOST; tick *= 10) put("me-tick", tick, null, `${+tick.toPrecision(1)}`);
    if (plan) put("me-plan", plan, null);
    return line;
  };

  Object.assign(metakeEdit, { make, number, share, distribution, interval });
})();
