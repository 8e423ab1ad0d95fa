"""The family's metrics (methods of ROME, MEMIT, AlphaEdit): one batched pass, logits only where they are read.

A probe asks for a continuation. With a rival it succeeds if the model finds the target strictly more probable, by the
mean log-probability of its tokens (CounterFact); without one its score is the share of target tokens that are the
model's arg-max when the answer is forced (ZsRE). A free answer is what the model writes by itself (arXiv 2502.11177).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import fmean
from typing import Any, NamedTuple

import torch

from metake.data.requests import EditCase, Probe
from metake.language.generation import greedy, sample
from metake.language.model import LanguageModel
from metake.language.tokens import encode, pad, prompted, seam
from metake.scoring.text_metrics import agreement, consistency, first_sentence, fluency
from metake.support.errors import ParameterError, RequestError, near_misses
from metake.support.machine import halving, sent
from metake.support.progress import progress

_Questions = dict[tuple[int, ...], list[tuple[int, int, tuple[int, ...]]]]  # row → (place, first position, answer)
NAMES = {
    "efficacy": "efficacy", "paraphrase": "generalization", "neighborhood": "specificity", "portability": "portability"
}
FREE = 24  # tokens of a free answer, unless the model ends it before


class Reading(NamedTuple):
    """What the model says of one continuation of one prompt."""

    log_p: float  # mean over the tokens
    correct: tuple[bool, ...]  # per token: is it the arg-max?
    greedy: tuple[int, ...]  # the arg-max tokens under forcing


class ProbeScore(NamedTuple):
    """One probe's outcome."""

    kind: str
    score: float  # success (with a rival) or share of correct tokens
    accuracy: float  # 1 if every target token is the arg-max
    target: Reading
    rival: Reading | None
    sort: str = ""
    answer: str | None = None  # written freely, to the end of its first sentence
    exact: float | None = None  # 1 if that is the target or one of its aliases, `text_metrics.normalized`
    contained: float | None = None  # 1 if one of them stands in it


@dataclass(frozen=True)
class CaseScore:
    """One case's outcome: its probes' scores, and its generations if they were asked for."""

    id: str
    probes: tuple[ProbeScore, ...]
    generations: tuple[str, ...] = ()
    fluency: float | None = None
    consistency: float | None = None

    def mean(self, kind: str, what: str = "score", sort: str = "") -> float | None:
        """Mean over the case's probes of a kind, and of a sort if one is given; None if it has none."""
        found = [getattr(p, what) for p in self.probes if p.kind == kind and sort in ("", p.sort)]
        values = [value for value in found if value is not None]
        return fmean(values) if values else None

    def row(self) -> dict[str, float]:
        """Its means by the names of `Evaluation.metrics`, as shares."""
        row: dict[str, float | None] = {}
        for kind, name in NAMES.items():
            for sort in dict.fromkeys(["", *(p.sort for p in self.probes if p.kind == kind)]):
                for what in ("score", "accuracy", "exact", "contained"):
                    parts = (name, sort, "" if what == "score" else what)
                    row["_".join(filter(None, parts))] = self.mean(kind, what, sort)
        row |= {"fluency": self.fluency, "consistency": self.consistency}
        return {name: value for name, value in row.items() if value is not None}


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a set of cases, in percent where they are shares; `cases` holds what they are made of."""

    cases: tuple[CaseScore, ...] = field(repr=False)
    before: Evaluation | None = field(default=None, repr=False)

    @property
    def metrics(self) -> dict[str, float]:
        """Name → mean over cases of the case's mean, in percent, of the cases that have such a probe.

        efficacy, generalization, specificity, portability: the probes' scores when the answer is forced; with a sort,
        such as portability_alias, of that sort. *_accuracy: share of probes whose every target token is the arg-max.
        *_exact, *_contained: of the free answers, those that are the target, or hold it (`evaluate(free=True)`).
        fluency, consistency: of generated texts, times 100 (ROME). specificity_pre_edit (MetaKE v3 eq. 105): share of
        unrelated answer tokens whose arg-max is as before the edit, if `before` was given; ZsRE's plain `specificity`
        is against the ground truth, as released code has it.
        """
        values: dict[str, list[float]] = {}
        for name, value in (item for row in self.records() for item in row.items()):
            if isinstance(value, float):
                values.setdefault(name, []).append(value)
        return {name: 100 * fmean(many) for name, many in values.items()}

    def _unchanged(self) -> list[float | None]:
        """Per case: share of its neighborhood answers' tokens whose arg-max is as before; None without such probes."""
        shares: list[float | None] = []
        for now, then in zip(self.cases, self.before.cases if self.before else (), strict=bool(self.before)):
            both = [p for p in zip(now.probes, then.probes, strict=True) if p[0].kind == "neighborhood"]
            pairs = [(a.target.greedy, b.target.greedy) for a, b in both]
            shares.append(fmean(fmean(x == y for x, y in zip(a, b, strict=True)) for a, b in pairs) if pairs else None)
        return shares

    def __getitem__(self, name: str) -> float:
        """One metric, in percent. Raises ParameterError, naming those there are, if no case has a probe for it."""
        if name not in (metrics := self.metrics):
            raise ParameterError(near_misses(str(name), metrics, "metric of these cases"))
        return metrics[name]

    def records(self) -> list[dict[str, Any]]:
        """One plain dictionary per case, as `metake run` writes them."""
        rows = []
        for case, unchanged in zip(self.cases, self._unchanged() or [None] * len(self.cases), strict=True):
            row: dict[str, Any] = {"id": case.id} | case.row()
            if unchanged is not None:
                row["specificity_pre_edit"] = unchanged
            if case.generations:
                row |= {"consistency": case.consistency, "generations": list(case.generations)}
            if answers := [p.answer for p in case.probes if p.answer is not None]:
                row["answers"] = answers
            rows.append(row)
        return rows

    def __str__(self) -> str:
        return f"{len(self.cases)} cases: " + ", ".join(f"{name} {value:.2f}" for name, value in self.metrics.items())


@LanguageModel.entry()
def evaluate(
    lm: LanguageModel, cases: Sequence[EditCase], generate: bool = False, before: Evaluation | None = None,
    seed: int = 0, length: int = 100, tokens: int = 8192, free: bool = False
) -> Evaluation:
    """Metrics of `lm` as it is now on the cases' probes (methods: CounterFact and ZsRE protocols of the family).

    generate: also sample the generation prompts to `length` tokens (fluency, and consistency where cases carry
    reference texts); before: an Evaluation of the same cases before the edit, for `specificity_pre_edit`; seed: of the
    sampling; tokens: of one micro-batch, which does not change the result; free: also what the model answers by itself,
    greedily, to the end of text or `FREE` tokens. Raises ParameterError for zero cases.
    """
    cases = list(cases)
    if not cases:
        raise ParameterError("a metric of zero cases is undefined: give at least one case")
    if before is not None and not _same_cases(lm, cases, before.cases):
        raise ParameterError(
            "`before` was evaluated on other cases than these; evaluate the same cases before and after"
        )
    probes = [p for c in cases for p in c.probes if p.kind in NAMES]
    pairs = [(p.prompt, text, p.seam) for p in probes for text in (p.target, p.rival) if text is not None]
    readings = dict(zip(pairs, read(lm, pairs, tokens), strict=True))
    answers = _answers(lm, probes, tokens) if free else {}
    texts = _generate(lm, cases, length, seed) if generate else [()] * len(cases)
    return Evaluation(tuple(_case(c, readings, answers, own) for c, own in zip(cases, texts, strict=True)), before)


def _same_cases(lm: LanguageModel, cases: list[EditCase], scores: Sequence[CaseScore]) -> bool:
    """Whether these scores can be those of these cases: ids, kinds of the probes, lengths of their targets."""

    def told(probe: Probe) -> tuple[str, int]:
        return probe.kind, len(prompted(lm.tokenizer, probe.prompt, probe.target, probe.seam)[1])

    asked = [(c.request.id, [told(p) for p in c.probes if p.kind in NAMES]) for c in cases]
    return asked == [(c.id, [(p.kind, len(p.target.greedy)) for p in c.probes]) for c in scores]


def _case(case: EditCase, readings: dict[tuple, Reading], answers: dict[tuple, str], texts: tuple) -> CaseScore:
    probes = tuple(_score(p, readings, answers.get((p.prompt, p.seam))) for p in case.probes if p.kind in NAMES)
    references = [p.target for p in case.probes if p.kind == "generation" and p.target]
    scores = (fluency(texts), consistency(texts, references[:1])) if texts else (None, None)
    return CaseScore(case.request.id, probes, texts, *scores)


def _score(probe: Probe, readings: dict[tuple, Reading], answer: str | None) -> ProbeScore:
    target = readings[probe.prompt, probe.target, probe.seam]
    rival = readings[probe.prompt, probe.rival, probe.seam] if probe.rival is not None else None
    score = fmean(target.correct) if rival is None else float(target.log_p > rival.log_p)
    found = ProbeScore(probe.kind, score, float(all(target.correct)), target, rival, probe.sort)
    if answer is None:
        return found
    said = first_sentence(answer, names := (probe.target, *probe.aliases))
    exact, contained = map(float, agreement(said, names))
    return found._replace(answer=said, exact=exact, contained=contained)


def _answers(lm: LanguageModel, probes: Sequence[Probe], tokens: int) -> dict[tuple, str]:
    """What the model writes after each prompt, each asked once."""
    prompts = list({(p.prompt, p.seam): None for p in probes})
    rows = [encode(lm.tokenizer, seam(*prompt)[0]) for prompt in prompts]
    return dict(zip(prompts, (text for text, _ in greedy(lm, rows, FREE, tokens)), strict=True))


@LanguageModel.entry()
def read(lm: LanguageModel, pairs: Sequence[tuple], tokens: int = 8192) -> list[Reading]:
    """Log-probabilities and arg-max tokens of continuations, (prompt, continuation) pairs, in the given order; a third
    item says what stands between the two (`tokens.seam`).

    Pairs that need the same forward (all continuations of one token share their prompt's) are run once; rows of similar
    length go together. Raises NumericalError, naming the first broken weight, for logits that are not finite.
    """
    wanted: _Questions = {}
    for i, (prompt, text, *between) in enumerate(pairs):
        start, answer = prompted(lm.tokenizer, prompt, text, *between)
        if not start:
            raise RequestError(
                f"the probe prompt {prompt!r} has no tokens; expected at least one before the answer {text!r}"
            )
        wanted.setdefault(start + answer[:-1], []).append((i, len(start) - 1, answer))
    most = min(tokens, lm.room(1, gradients=False))
    return halving(lambda tokens: _read(lm, wanted, len(pairs), tokens), most, lm.fitted)


def _read(lm: LanguageModel, wanted: _Questions, count: int, tokens: int) -> list[Reading]:
    rows = list(wanted)
    result: list[Reading | None] = [None] * count
    for group in progress(lm.groups([len(r) for r in rows], tokens), "evaluate"):
        asked = [(k, *question) for k, row in enumerate(group) for question in wanted[rows[row]]]
        where = [(k, first + j) for k, _, first, answer in asked for j in range(len(answer))]
        labels = sent([t for *_, answer in asked for t in answer], lm.device)
        logits = lm.logits(pad([rows[i] for i in group], lm.device), *zip(*where, strict=True))
        log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        log_p = log_p.gather(1, labels[:, None])[:, 0]
        log_p, best = torch.stack([log_p.double(), logits.argmax(-1).double()]).tolist()  # in one transfer
        best, at = list(map(int, best)), 0
        for _, i, _, answer in asked:
            span = slice(at, at + len(answer))
            correct = tuple(a == b for a, b in zip(best[span], answer, strict=True))
            result[i] = Reading(fmean(log_p[span]), correct, tuple(best[span]))
            at += len(answer)
    return result


def require_prompts(cases: Sequence[EditCase]) -> None:
    """Raise ParameterError if none of the cases has a prompt to generate from."""
    if not any(p.kind == "generation" for c in cases for p in c.probes):
        raise ParameterError("generation was asked for, but these cases have no generation prompts (ZsRE has none)")


def _generate(lm: LanguageModel, cases: list[EditCase], length: int, seed: int) -> list[tuple[str, ...]]:
    require_prompts(cases)
    asked = [[p.prompt for p in c.probes if p.kind == "generation"] for c in cases]
    streams = [f"{c.request.id}/{j}" for c, prompts in zip(cases, asked, strict=True) for j in range(len(prompts))]
    texts = iter(sample(lm, [p for prompts in asked for p in prompts], length, seed=seed, streams=streams))
    return [tuple(islice(texts, len(prompts))) for prompts in asked]


@LanguageModel.entry()
def recall(lm: LanguageModel, cases: Sequence[EditCase]) -> dict[str, float]:
    """Share of what the cases hold true that the model gives by greedy arg-max: on plain prompts and on paraphrases.

    True is a probe's rival (CounterFact: the object before the edit), or its target where it has none (ZsRE).
    """
    shares = {}
    for name, kind in (("plain", "efficacy"), ("paraphrase", "paraphrase")):
        asked = [(p.prompt, p.rival or p.target, p.seam) for c in cases for p in c.probes if p.kind == kind]
        if not asked:
            raise ParameterError(f"recall needs {kind} probes; these cases have none")
        shares[name] = fmean(all(r.correct) for r in read(lm, asked))
    return shares
