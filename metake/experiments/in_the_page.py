"""Edit your own fact, in the page: planned targets of a grid of facts and objects, and what a browser needs to solve.

A plan needs gradients and is recorded here, one request at a time; keys, gate and update are computed in the page by
the library's own formula, Δ = R·M, and `edited` is what they are compared with. Plans are kept as whole numbers of
1/127 of their largest coordinate, so that the record stays small: `Plans.planned` is what both sides edit with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metake.algebra.geometry import KeyStatistics, MetricRule, inverse_covariance, null_space
from metake.algebra.update import Edit
from metake.data.facts import facts_records, interleaved
from metake.data.requests import EditRequest, batches
from metake.editing.bilevel import refine as refined
from metake.editing.editor import Editor
from metake.editing.recipes import recipe
from metake.editing.state import EditorState
from metake.editing.targets import Targets, optimize_targets
from metake.language.model import LanguageModel
from metake.language.tokens import Rows, continuation, encode, pad
from metake.methods import METHODS
from metake.support.errors import ParameterError, ProvenanceError, near_misses
from metake.support.machine import versions
from metake.support.storage import atomic_path, load_tensors, reading, save_tensors

MODEL = "tiny"
OFFERED = ("rome", "memit", "alphaedit", "metake")
SUBJECTS, OBJECTS = 2, 2  # of each relation, and of each of these subjects
STRENGTHS = (0.1, 1.0, 10.0)  # λ of the gate that MetaKE's plans were refined through
Contexts = Mapping[str, Sequence[str]]  # "rome" and "family" → its context templates
LEVELS = 127  # steps of a kept coordinate to either side


def plan_name(method: str, strength: float = 1.0) -> str:
    """Which record a method plans with: MEMIT and AlphaEdit share Stage I, MetaKE's refinement depends on λ."""
    if method not in OFFERED:
        raise ParameterError(near_misses(method, OFFERED, "method of this page"))
    if method == "metake":
        if strength not in STRENGTHS:
            raise ParameterError(f"MetaKE's plans are recorded at λ in {STRENGTHS}; found {strength}: choose one")
        return f"metake/{strength:g}"
    return "rome" if method == "rome" else "stage_one"


def pairs(tokenizer: Any, subjects: int = SUBJECTS, objects: int = OBJECTS) -> list[EditRequest]:
    """The grid: of each relation the first facts of the embedded set, each with its own counterfactual object and the
    next ones of the relation, whose first tokens all differ, from the true object's too. It goes round the relations,
    so that any beginning of it is spread as evenly."""
    every: dict[str, list[dict]] = {}
    for record in facts_records():
        every.setdefault(record["relation_id"], []).append(record["requested_rewrite"])
    found = {relation: [] for relation in every}
    for relation, facts in every.items():
        known = list(dict.fromkeys(fact["target_true"]["str"] for fact in facts))
        for fact in facts[:subjects]:
            true, own = fact["target_true"]["str"], known.index(fact["target_new"]["str"])
            begun, chosen = {continuation(tokenizer, true)[0]}, []
            for new in known[own:] + known[:own]:
                if len(chosen) < objects and (first := continuation(tokenizer, new)[0]) not in begun:
                    begun.add(first)
                    chosen.append(new)
            ids = (f"{relation}|{fact['subject']}|{new}" for new in chosen)
            own = (EditRequest(fact["prompt"], fact["subject"], n, i) for n, i in zip(chosen, ids, strict=True))
            found[relation].append(list(own))
    return interleaved(interleaved(own) for own in found.values())  # every subject once before any twice


def rule(method: str, strength: float | None = None) -> MetricRule:
    """A method's metric at λ: MEMIT's λ C, the others' P/λ; ROME's has none, an exact write cancels it."""
    numbers = recipe(MODEL)
    if method == "rome":
        return METHODS["rome"](MODEL).metric
    if method == "memit":
        return inverse_covariance(strength or numbers.covariance_weight)
    return null_space(numbers.threshold, strength or numbers.ridge)


def editor(method: str, strength: float | None = None, contexts: Contexts | None = None) -> Editor:
    """The library's editor of one request with a plan at hand: the plan is refined already, one request is a batch.

    contexts: the recorded templates; None: they are sampled."""
    own = contexts and tuple(contexts["rome" if method == "rome" else "family"])
    return METHODS[method](MODEL, metric=rule(method, strength), refine=None, together=None, contexts=own)


class Kept(NamedTuple):
    """Vectors as whole numbers: v ≈ scale · steps."""

    steps: Tensor  #  (n, d) int8
    scale: Tensor  #  (n,) float32

    @classmethod
    def of(cls, vectors: Tensor) -> Kept:
        scale = (vectors.abs().amax(1) / LEVELS).float()
        return cls((vectors / scale.double()[:, None]).round().to(torch.int8), scale)

    @property
    def vectors(self) -> Tensor:
        """(n, d) float64."""
        return self.steps.double() * self.scale.double()[:, None]


@dataclass(frozen=True)
class Plans:
    """Planned residuals of a grid of requests: `stage_one`, `rome`, and what MetaKE's refinement adds at each λ."""

    requests: tuple[EditRequest, ...]
    kept: Mapping[str, Kept]
    source: Mapping[str, Any]

    def planned(self, place: int, method: str, strength: float = 1.0) -> Tensor:
        """r of one request, (1, d) float64."""
        name = plan_name(method, strength)
        own = self.kept[name].vectors[place : place + 1]
        return own + self.kept["stage_one"].vectors[place : place + 1] if method == "metake" else own

    def joined(self, requests: Sequence[EditRequest], kept: Mapping[str, Kept]) -> Plans:
        """These plans and more."""
        both = {n: Kept(*map(torch.cat, zip(self.kept[n], k, strict=True))) for n, k in kept.items() if n in self.kept}
        return replace(self, requests=(*self.requests, *requests), kept={**kept, **both})

    def save(self, path: str | Path) -> None:
        """One safetensors file: the vectors, the requests, and where they come from."""
        tensors = {f"{name}.{part}": t for name, k in self.kept.items() for part, t in k._asdict().items()}
        told = [[r.prompt, r.subject, r.target, r.id] for r in self.requests]
        meta = {"requests": json.dumps(told, ensure_ascii=False), "source": json.dumps(dict(self.source))}
        with atomic_path(path) as file:
            save_tensors(tensors, file, meta)

    @classmethod
    def load(cls, path: str | Path) -> Plans:
        """Read what `save` wrote. Raises ProvenanceError if it is damaged."""
        with reading(path, "holds no plans", "record them again: python tools/plan_in_page.py", ProvenanceError):
            tensors, meta = load_tensors(path)
            names = sorted({name.rpartition(".")[0] for name in tensors})
            kept = {n: Kept(tensors[f"{n}.steps"], tensors[f"{n}.scale"]) for n in names}
            requests = tuple(EditRequest(*told) for told in json.loads(meta["requests"]))
            return cls(requests, kept, json.loads(meta["source"]))


def plan(
    lm: LanguageModel, statistics: Mapping[int, KeyStatistics], requests: Sequence[EditRequest], few: int = 3,
    known: Plans | None = None
) -> Iterator[Plans]:
    """Stage I, ROME's targets and MetaKE's refinement at each λ, of each request alone; what is finished after every
    `few` of them, so that who is stopped can go on from what is `known`.

    Cost: about 2.2 s a request on one thread.
    """
    editors = {"rome": editor("rome"), "stage_one": editor("memit")}
    contexts = {name: own.init(lm, statistics).contexts for name, own in editors.items()}
    told = source(lm, statistics, {"rome": list(contexts["rome"]), "family": list(contexts["stage_one"])})
    outer = METHODS["metake"](MODEL).refine
    refining = {s: replace(editor("metake", s, told["contexts"]), refine=outer) for s in STRENGTHS}
    states = {s: one.init(lm, statistics) for s, one in refining.items()}
    if known and (known.source != told or known.requests != tuple(requests[: len(known.requests)])):
        raise ProvenanceError("the plans that are there are of another model, version or grid: remove them, start anew")
    done = known or Plans((), {}, told)
    for group in batches(list(requests[len(done.requests) :]), few):  # requests do not meet in Stage I
        made = {
            name: optimize_targets(lm, group, contexts[name], own.layers[-1], own.target)
            for name, own in editors.items()
        }
        found = {name: targets.planned for name, targets in made.items()}
        for strength, one in refining.items():
            found[plan_name("metake", strength)] = torch.cat(
                [_refined(lm, request, made["stage_one"].planned[[i]], one, states[strength])
                 for i, request in enumerate(group)]
            )  # fmt: skip
        done = done.joined(group, {name: Kept.of(vectors) for name, vectors in found.items()})
        yield done


def _refined(lm: LanguageModel, request: EditRequest, planned: Tensor, own: Editor, state: EditorState) -> Tensor:
    """What MetaKE's outer level adds to the plan of one request, (1, d)."""
    layer, rows = own.layers[-1], Rows.of(lm.tokenizer, [request], state.contexts)
    reader = own.reading.reader(lm, rows, layer)
    targets = Targets(layer, reader.read(layer).current, planned, ({},))
    found = refined(lm, rows, rows.contexts, targets, own.through(lm, state, reader, layer), own.refine)
    return found.planned - planned


def source(lm: LanguageModel, statistics: Mapping[int, KeyStatistics], contexts: Contexts) -> dict[str, Any]:
    """What plans depend on, in words that a later reader can compare."""
    family, numbers = editor("memit"), recipe(MODEL)
    return {
        "model": lm.name, "dtype": str(lm.dtype).removeprefix("torch."), "seed": family.seed, "steps": numbers.steps,
        "weights": {path: lm.digest(path) for path in family.paths(lm)}, "refine_steps": numbers.refine_steps,
        "statistics": getattr(statistics, "digest", ""), "contexts": dict(contexts), "versions": versions()
    }


def edited(lm: LanguageModel, plans: Plans, place: int, method: str, own: Editor, state: EditorState) -> Edit:
    """The library's edit from a recorded plan by `own`, an `editor`, whose fresh state is `state`; `lm` stays."""
    request, layer = plans.requests[place], own.layers[-1]
    anchor = own.reading.reader(lm, Rows.of(lm.tokenizer, [request], state.contexts), layer).read(layer).current
    strength = getattr(own.metric, "ridge", 1.0)
    return own.step(lm, [request], state, Targets(layer, anchor, plans.planned(place, method, strength), ({},)))[0]


def example(
    lm: LanguageModel, statistics: Mapping[int, KeyStatistics], plans: Plans, method: str, place: int = 0
) -> list[tuple[str, str, list[tuple[str, float, float]]]]:
    """The page's first view: kind and text of a question, and of the taught and the new answer's first token the
    probability to come next, before and after the edit."""
    request, record = plans.requests[place], _record(plans.requests[place])
    texts = [("prompt", request.text), ("paraphrase", record["paraphrase_prompts"][0].partition(". ")[2])]
    texts.append(("neighbor", record["neighborhood_prompts"][0]))
    answers = [record["requested_rewrite"]["target_true"]["str"], request.target]
    first = [continuation(lm.tokenizer, answer)[0] for answer in answers]
    before = [next_token(lm, text)[first].tolist() for _, text in texts]
    own = editor(method, contexts=plans.source["contexts"])
    with edited(lm, plans, place, method, own, own.init(lm, statistics)).applied(lm):
        after = [next_token(lm, text)[first].tolist() for _, text in texts]
    return [
        (kind, text, list(zip(answers, *pair, strict=True)))
        for (kind, text), pair in zip(texts, zip(before, after, strict=True), strict=True)
    ]


def _record(request: EditRequest) -> dict:
    return next(
        r for r in facts_records()
        if (r["requested_rewrite"]["prompt"], r["requested_rewrite"]["subject"]) == (request.prompt, request.subject)
    )  # fmt: skip


@LanguageModel.entry()
def next_token(lm: LanguageModel, text: str) -> Tensor:
    """Probabilities of every token to come next after a text, (vocabulary,) float64."""
    ids = encode(lm.tokenizer, text)
    return lm.logits(pad([ids], lm.device), [0], [len(ids) - 1])[0].double().softmax(0)
