"""A stream of edits that outlasts its data: facts that were edited are edited once more, to another object."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from metake.data.requests import Cases, EditCase, Probe
from metake.experiments.cases import select
from metake.language.model import LanguageModel
from metake.support.errors import ParameterError

EDITED = 0.75  # of a data set's facts at most; the others stay as they are, so that specificity has something to ask


def revised(cases: Sequence[EditCase], seed: int) -> Cases:
    """The same facts edited once more, each to another object of its relation: CounterFact cases, ids end in +1, +2, …

    Objects of a relation: what the given cases with the same prompt hold true or write. The new one is none that the
    fact had before, and its probes ask for it alone, against each of those (`streams` wants it to beat them all);
    neighbors are asked for their own object against it. A fact whose relation has no such object left is passed over.
    Generation prompts lose their reference.
    Raises ParameterError if no fact can be revised, or the cases do not say what was true before (ZsRE).
    """
    objects = defaultdict(set)
    for case in cases:
        objects[case.request.prompt] |= _had(case)
    found = []
    for case in cases:
        if left := sorted(objects[case.request.prompt] - _had(case)):
            found.append(_renewed(case, random.Random(f"{seed}/{case.request.id}").choice(left)))
    if not found:
        raise ParameterError(
            f"none of {len(cases)} facts has another object of its relation to be revised to; expected a shorter "
            "stream, or more facts"
        )
    return Cases(found, "counterfact", getattr(cases, "source", ""))


def _had(case: EditCase) -> set[str]:
    """Every object that a fact has had: the one it is edited to, and those before."""
    rivals = {p.rival for p in case.probes if p.kind == "efficacy"}
    if None in rivals or not rivals:
        raise ParameterError(
            f"case {case.request.id!r} does not say what was true before its edit (ZsRE does not); only "
            "CounterFact cases can be revised"
        )
    return rivals | {case.request.target}


def _renewed(case: EditCase, target: str) -> EditCase:
    name, _, turn = case.request.id.partition("+")
    request = replace(case.request, target=target, id=f"{name}+{int(turn or 0) + 1}")
    asked = dict.fromkeys((p.kind, p.prompt, p.seam) for p in case.probes if p.kind in ("efficacy", "paraphrase"))
    probes = [Probe(kind, prompt, target, rival, seam) for kind, prompt, seam in asked for rival in sorted(_had(case))]
    probes += [replace(p, rival=target) for p in case.probes if p.kind == "neighborhood" and p.target != target]
    probes += [replace(p, target="") for p in case.probes if p.kind == "generation"]
    return EditCase(request, tuple(probes))


def plan(lm: LanguageModel, cases: Cases, edits: int, batch: int, seed: int = 0) -> Cases:
    """The stream: cases in an order drawn by `seed`, and once ¾ of the data set are edited, the same facts `revised`.

    The first batch is never revised: what is kept of it can be followed to the end. Neighborhood probes that name a
    subject of the stream are dropped: their answers are meant to change. Raises ParameterError if the data do not last.
    """
    turn = list(select(lm, cases, max(min(edits, int(EDITED * len(cases))), 1), seed))
    stream, turn = list(turn), turn[batch:]
    while len(stream) < edits:
        turn = list(revised(turn, seed))
        stream += turn
    stream = stream[:edits]
    subjects = {c.request.subject for c in stream}
    untouched = {
        prompt: not any(s in prompt for s in subjects)
        for c in stream
        for prompt in (p.prompt for p in c.probes if p.kind == "neighborhood")
    }
    stream = [
        c._replace(probes=tuple(p for p in c.probes if p.kind != "neighborhood" or untouched[p.prompt])) for c in stream
    ]
    return Cases(stream, cases.format, cases.source, cases.skipped)
