// Edit your own fact: what a reader chooses, and what is computed of it, all in this page.
(() => {
  metakeEdit.folder = new URL(".", document.currentScript.src).href;
  const { make, number } = metakeEdit;
  const NAMES = { rome: "ROME", memit: "MEMIT", alphaedit: "AlphaEdit", metake: "MetaKE" };
  const BARS = { prompt: 6, other: 3 };  // tokens shown of the edited prompt, and of every other text
  const FEW = 2;  // paraphrases, and neighbors with the same answer
  const UNDO = "Undo the edit";
  const STOPS = 8;  // of the slider to either side of the usual λ, four to a factor of ten

  // -- what is asked ------------------------------------------------------------------------------------------------

  const answers = (relation) => {
    const found = new Map();
    for (const [object, subjects] of Object.entries(relation.objects)) for (const s of subjects) found.set(s, object);
    return found;
  };
  const fill = (form, subject) => form.replace("{}", subject);
  const blank = (form) => form.replace("{}", "…");

  // The subject that a reader means: as it is written, whatever its capitals.
  const meant = (relation, typed) => {
    const own = typed.trim().replace(/\s+/g, " ").toLowerCase();
    return [...answers(relation).keys()].find((subject) => subject.toLowerCase() === own);
  };

  // Why a subject is not known here, and what to do, in one line.
  const unknown = (data, relation, typed) => {
    if (!typed.trim()) return "No subject is given: type one, or choose it from the list.";
    const other = data.relations.find((one) => one !== relation && meant(one, typed));
    if (other) return `“${typed}” is known, but not for “${blank(relation.prompt)}”: choose “${blank(other.prompt)}” above.`;
    const known = [...answers(relation).keys()], start = typed.trim().slice(0, 2).toLowerCase();
    const near = [...known.filter((s) => s.toLowerCase().startsWith(start)), ...known].slice(0, 3);
    return `“${typed}” is no subject that this model was taught for “${blank(relation.prompt)}”: choose one of its `
      + `${known.length}, such as ${near.join(", ")}.`;
  };

  const recorded = (data, relation, subject) => data.pairs
    .map(([id, own, object], place) => ({ id, own, object, place }))
    .filter(({ id, own }) => id === relation.id && (!subject || own === subject));

  // The texts that are asked before and after: the prompt, other wordings of it, and facts that should stay.
  const texts = (relation, subject) => {
    const known = answers(relation), own = known.get(subject);
    const same = relation.objects[own].filter((one) => one !== subject).slice(0, FEW);
    const objects = Object.keys(relation.objects), next = objects[(objects.indexOf(own) + 1) % objects.length];
    const others = [...same, relation.objects[next][0]];
    return [
      { kind: "prompt", text: fill(relation.prompt, subject), taught: own },
      ...relation.paraphrases.slice(0, FEW).map((form) => ({ kind: "paraphrase", text: fill(form, subject), taught: own })),
      ...others.map((one) => ({ kind: "neighbor", text: fill(relation.prompt, one), taught: known.get(one) })),
    ];
  };

  // -- the parts of the page ----------------------------------------------------------------------------------------

  const labelled = (name, control, ...more) => make("label", { class: "me-field" }, make("span", {}, name), control, ...more);

  const build = (root, data) => {
    const relation = make("select", {}, ...data.relations.map((one, i) => make("option", { value: `${i}` }, blank(one.prompt))));
    const list = make("datalist", { id: "metake-edit-subjects" });
    const subject = make("input", { type: "text", list: list.id, autocomplete: "off", spellcheck: false });
    const object = make("select", {});
    const methods = make("fieldset", { class: "me-methods" }, make("legend", {}, "Method"), ...Object.entries(NAMES).map(
      ([value, name]) => make("label", {}, make("input", { type: "radio", name: "metake-edit-method", value, checked: value === "metake" }), ` ${name}`)
    ));
    const slider = make("input", { type: "range", min: "0", step: "1" }), strength = make("output", {});
    const undo = make("button", { type: "button", class: "me-button", hidden: true, disabled: true }, UNDO);
    const line = make("p", { class: "me-said", role: "status", "aria-live": "polite" });
    const panels = Object.fromEntries(["figures", "prompt", "paraphrase", "neighbor"].map((n) => [n, make("div", { class: `me-${n}` })]));
    const panel = (title, told, inside) => make("section", { class: "me-panel" }, make("p", { class: "me-title" }, title), make("p", { class: "me-told" }, told), inside);
    const live = make("div", { class: "me-live" },
      make("div", { class: "me-choice" }, labelled("Fact", relation), labelled("Subject (type or choose)", subject, list), labelled("New object", object)),
      make("div", { class: "me-choice" }, methods, labelled("λ, the weight of leaving others alone", slider, strength)),
      make("div", { class: "me-act" }, undo, line), panels.figures,
      panel("The edited prompt", "What the model says next. The new object should lead after the edit.", panels.prompt),
      panel("The same asked in other words", "A paraphrase should follow the edit; this small model often stays behind.", panels.paraphrase),
      panel("Neighbors", "Other subjects of the same relation, the first with the same answer. They should stay.", panels.neighbor));
    root.append(live);
    root.querySelector(".me-still").hidden = true;
    return { relation, list, subject, object, methods, slider, strength, undo, line, panels, live };
  };

  // -- from a choice to what is shown -------------------------------------------------------------------------------

  class Page {
    constructor(root, model) {
      Object.assign(this, { root, model, data: model.data, on: true, asked: 0, before: new Map(), keys: new Map(), places: {} });
      this.parts = build(root, model.data);
      const { relation, subject, object, methods, slider, undo } = this.parts;
      relation.addEventListener("change", () => this.relate());
      subject.addEventListener("change", () => this.subjected());
      for (const control of [object, methods]) control.addEventListener("change", () => this.choose());
      slider.addEventListener("input", () => this.choose(false));
      undo.addEventListener("click", () => { this.on = !this.on; this.refresh(); });
      this.relate();
    }

    get relation() { return this.data.relations[+this.parts.relation.value]; }
    get method() { return this.parts.methods.querySelector(":checked").value; }

    // λ at the slider's stops: around the usual one; of MetaKE those at which plans were refined.
    stops(method) {
      const { usual } = this.data.methods[method];
      if (method === "metake") return this.data.strengths;
      return usual ? Array.from({ length: 2 * STOPS + 1 }, (_, i) => usual * 10 ** ((i - STOPS) / 4)) : [];
    }

    relate() {
      const known = [...answers(this.relation).keys()], own = recorded(this.data, this.relation);
      this.parts.list.replaceChildren(...known.map((value) => make("option", { value })));
      this.parts.subject.value = own.length ? own[0].own : known[0];
      this.subjected();
    }

    subjected() {
      const subject = meant(this.relation, this.parts.subject.value), own = answers(this.relation).get(subject);
      const have = new Set(recorded(this.data, this.relation, subject || "?").map((one) => one.object));
      const rest = Object.keys(this.relation.objects).filter((one) => one !== own && !have.has(one));
      const group = (label, names) => names.length && make("optgroup", { label }, ...names.map((value) => make("option", { value }, value)));
      this.parts.object.replaceChildren(...[group("with a plan", [...have]), group("without one", rest)].filter(Boolean));
      this.choose();
    }

    choose(fresh = true) {
      const { slider, strength } = this.parts, stops = this.stops(this.method);
      if (fresh) {
        slider.disabled = !stops.length;
        slider.max = `${Math.max(0, stops.length - 1)}`;
        slider.value = `${this.places[this.method] ?? (stops.length - 1) / 2}`;
      } else this.places[this.method] = +slider.value;
      this.strength = stops.length ? stops[+slider.value] : null;
      strength.textContent = this.strength === null ? "an exact write: λ cancels" : number(this.strength);
      slider.setAttribute("aria-valuetext", strength.textContent);
      this.on = true;
      this.refresh();
    }

    // Compute and draw; a later choice overtakes an earlier one between two steps.
    async refresh() {
      const turn = ++this.asked, pause = () => new Promise((done) => setTimeout(done));
      this.root.dataset.state = "busy";
      await pause();
      if (turn !== this.asked) return;
      const { relation, method, strength } = this, typed = this.parts.subject.value, subject = meant(relation, typed);
      this.parts.live.classList.toggle("me-empty", !subject);
      this.parts.undo.disabled = true;
      if (!subject) return this.finish(unknown(this.data, relation, typed));
      const request = { prompt: relation.prompt, subject }, object = this.parts.object.value;
      const found = recorded(this.data, relation, subject).find((one) => one.object === object);
      try {
        const covariance = method === "rome" || method === "memit" ? await metakeEdit.part("covariance") : null;
        if (turn !== this.asked) return;
        const seen = this.diagnosed(request, method, strength, covariance);
        const plan = found && metakeEdit.planned(this.data, found.place, method, strength);
        await pause();
        if (turn !== this.asked) return;
        const edit = plan && metakeEdit.solve(this.model, request, method, strength, plan, covariance);
        this.figures(seen, plan && metakeEdit.norm(plan), edit);
        const drawn = await this.ask(turn, texts(relation, subject), object, edit && this.on ? edit.updates : null, pause);
        if (drawn) this.finish(this.told(subject, object, found, relation, drawn));
      } catch (error) {
        this.finish(`${error.message}. Choose another fact, or load the page again.`);
      }
    }

    // What happened, in one line. after: probabilities of the taught and the new answer at the edited prompt.
    told(subject, object, found, relation, { taught, after }) {
      this.parts.undo.disabled = !found;
      this.parts.undo.textContent = this.on ? UNDO : "Make the edit again";
      if (found) {
        if (!this.on) return "Undone: the update is dropped, and the model is what it was, bit for bit.";
        const [was, is] = after.map(metakeEdit.share), wrote = `${NAMES[this.method]} wrote ${subject} → ${object}`;
        return after[1] > after[0] ? `${wrote}: now ${object} (${is}) leads ${taught} (${was}).`
          : `${wrote}, and it does not suffice: ${taught} (${was}) still leads ${object} (${is}).`;
      }
      const own = recorded(this.data, relation, subject).map((one) => one.object);
      const some = [...new Set(recorded(this.data, relation).map((one) => one.own))].join(" or ");
      const instead = own.length ? `choose ${own.join(" or ")} for ${subject}.` : some ? `choose ${some} as the subject.`
        : `choose another fact, such as “${blank(this.data.relations.find(({ id }) => id === this.data.pairs[0][0]).prompt)}”.`;
      return `No plan was recorded for ${subject} → ${object}, so γ, β and the interval are shown, and no edit: ${instead}`;
    }

    finish(line) {
      this.parts.undo.hidden = this.parts.undo.disabled;
      this.parts.line.textContent = line;
      this.root.dataset.state = "ready";
    }

    // Keys do not depend on λ: read once for a subject and a method's contexts.
    diagnosed(request, method, strength, covariance) {
      const kind = `${method === "rome"} ${request.prompt} ${request.subject}`;
      const make = () => metakeEdit.diagnose(this.model, request, method, strength, covariance);
      const kept = this.keys.get(kind) || this.keys.set(kind, make()).get(kind);
      const { key, plain, size, end } = kept;
      return { ...kept, ...metakeEdit.feasible(this.model, method, strength, key, plain, size, end, covariance) };
    }

    figures({ gamma, beta, lower, upper, size, end }, plan, edit) {
      const pair = (name, value, told) => make("div", {}, make("dt", {}, name), make("dd", {}, make("b", {}, value), make("span", {}, told)));
      const exact = upper === Infinity, empty = lower > upper, [least, most] = [lower, upper].map(number);
      const quarter = `${number(metakeEdit.SHARE * size)}, a quarter of ${exact ? "what this block’s MLP says" : "the hidden state’s length"}`;
      const place = empty ? "" : plan < lower ? ", shorter than the interval" : plan > upper ? ", longer than the interval" : ", within the interval";
      const wrote = edit && !exact && edit.layers.map((one) => `${Math.round(100 * one.beta)} %`).join(", ");
      this.parts.panels.figures.replaceChildren(
        make("dl", { class: "me-numbers" },
          pair("γ", number(gamma), `how strongly block ${end}’s key of the subject points where this method may write`),
          pair("β", beta.toFixed(2), exact ? "the share of a plan that is written: all of it" : "γ/(1+γ), the share of a plan that this block alone would write"),
          pair("feasible ‖r‖", exact ? `${least} or more` : empty ? "empty" : `${least} to ${most}`,
            `at least ${least}, so that ${quarter}, arrives (τ/β); ` + (exact ? "an exact write leaves nothing, so no upper end"
              : `at most ${most}, so that no more than that stays unwritten (ε(1+γ))`)),
          plan ? pair("plan ‖r‖", number(plan), `length of the recorded plan${place}`) : null),
        metakeEdit.interval({ lower, upper }, plan),
        make("p", { class: "me-told" }, "The line: lengths of a plan, each mark ten times the last. "
          + (empty ? "The feasible interval is empty: the two strokes are its ends in the wrong order. " : "Band: the feasible interval. ")
          + (plan ? "Dot: the plan. " : "")
          + (wrote ? `The interval is of the last block alone, and the edit has three: they wrote ${wrote} of what each was asked. So a plan beyond it may still succeed.` : "")));
    }

    // All texts before and after; of the first, the prompt, the answers' probabilities. Null if another choice came.
    async ask(turn, every, object, updates, pause) {
      const first = (answer) => this.model.tokenizer.encode(` ${answer}`)[0], drawn = { prompt: [], paraphrase: [], neighbor: [] };
      let found = null;
      for (const { kind, text, taught } of every) {
        if (!this.before.has(text)) this.before.set(text, this.model.next(text));
        await pause();
        const after = updates && this.model.next(text, updates);
        await pause();
        if (turn !== this.asked) return null;
        found ||= { taught, after: after && [after[first(taught)], after[first(object)]] };
        const marks = new Map([[first(taught), "true"], [first(object), "new"]]);
        if (taught === object) marks.set(first(object), "true");
        drawn[kind].push(metakeEdit.distribution(text, this.before.get(text), after, marks,
          (id) => this.model.tokenizer.word(id), BARS[kind] || BARS.other));
      }
      for (const [kind, tables] of Object.entries(drawn)) this.parts.panels[kind].replaceChildren(...tables);
      return found;
    }
  }

  // -- the beginning ------------------------------------------------------------------------------------------------

  addEventListener("DOMContentLoaded", () => {
    const root = document.getElementById("metake-edit");
    if (!root) return;
    const start = async () => {
      root.dataset.state = "loading";
      try {
        metakeEdit.page = new Page(root, new metakeEdit.Model(await metakeEdit.part("model")));
      } catch (error) {
        root.dataset.state = "failed";
        root.append(make("p", { class: "me-said", role: "status" }, `The model of this page could not be loaded: ${error.message}. Build the book again with make html.`));
      }
    };
    const seen = new IntersectionObserver((entries) => {
      if (entries.some((entry) => entry.isIntersecting)) { seen.disconnect(); start(); }
    }, { rootMargin: "600px" });
    seen.observe(root);
  });
})();
