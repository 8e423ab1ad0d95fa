"""Where published code departs from its paper: which of the two is the default here, and what the other one changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from metake import methods
from metake.algebra.geometry import KeyStatistics
from metake.data.requests import Cases, Probe
from metake.editing.editor import Editor
from metake.editing.gradient.editor import GradientEditor
from metake.editing.record import describe
from metake.editing.statistics import statistics
from metake.experiments.cases import read_cases, select
from metake.experiments.decision import all_of, equal, for_and_against, opposite
from metake.experiments.runs import edit_sequence
from metake.experiments.studies.comparison import paired_differences, summarize
from metake.language.model import LanguageModel, load
from metake.language.tokens import pad, prompted
from metake.scoring.evaluation import NAMES, Evaluation, evaluate
from metake.support.errors import ParameterError

NAMED = methods.DIFFERENCES | methods.GRADIENT_DIFFERENCES
MATTERS = 0.01  # of the default's norm: an update that is further from it than this is another update


def default_of(option: str) -> str:
    """The method that an option's name begins with."""
    return option.partition("/")[0]


def options(model: str = "tiny") -> list[str]:
    """Every named difference, but for those of trained editors that this model has none of."""
    found = list(methods.DIFFERENCES)
    for option in methods.GRADIENT_DIFFERENCES:
        with contextlib.suppress(ParameterError):
            methods.method(option, model)
            found.append(option)
    return found


def table(model: str = "tiny") -> pd.DataFrame:
    """One row per named difference: option (the name to type), paper, code, default ("paper", "code" or "ours"), and
    the parts of the default's editor for `model` that the option changes, as name: default → option."""
    rows = []
    for option in options(model):
        found = NAMED[option]
        parts = [dict(_flat(_described(methods.method(name, model)))) for name in (default_of(option), option)]
        changed = [
            f"{k.replace('.0.', '.')}: {parts[0].get(k)} → {parts[1].get(k)}"
            for k in {**parts[0], **parts[1]}
            if parts[0].get(k) != parts[1].get(k)
        ]
        rows.append(
            {
                "option": option, "paper": found.paper, "code": found.code, "default": found.default,
                "changes": "; ".join(changed) or None
            }
        )
    return pd.DataFrame(rows)


def _described(editor: Editor | GradientEditor) -> dict[str, Any]:
    return describe(editor.rule if isinstance(editor, GradientEditor) else editor)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of plain data's leaves."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        yield from _flat(dict(enumerate(value)), name)
    else:
        yield name, value


def effects(
    model: str = "tiny", options: Sequence[str] = tuple(NAMED), edits: int = 12, batch: int = 6, data: str = "facts",
    seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Each default and each option on the same requests, one batch after the other; all cases evaluated after the last.

    Returns (one row per case and method, as `comparison` has them; one row per option: method, change = ‖Δ′ − Δ‖/‖Δ‖
    and size = ‖Δ′‖/‖Δ‖ of the whole sequence's updates, all weights together).
    """
    lm = load(model)
    cases = select(lm, read_cases(data), edits, seed)
    names = list(dict.fromkeys(name for option in options for name in (default_of(option), option)))
    given = statistics(lm, layers=sorted({layer for name in names for layer in methods.method(name, model).layers}))
    before, rows, totals = evaluate(lm, cases), [], {}
    for name in names:
        totals[name], after = _edited(lm, methods.method(name, model, seed=seed), cases, batch, given, before)
        rows += [{"dataset": "CounterFact format", "method": name, "seed": seed} | row for row in after.records()]
    changes = []
    for option in options:
        default, other = totals[default_of(option)], totals[option]
        norm = _norm(default)
        change = _norm({module: other[module] - default[module] for module in default})
        changes.append(
            {"option": option, "method": default_of(option), "change": change / norm, "size": _norm(other) / norm}
        )
    return pd.DataFrame(rows), pd.DataFrame(changes)


def _edited(
    lm: LanguageModel, editor: Editor | GradientEditor, cases: Cases, batch: int, given: Mapping[int, KeyStatistics],
    before: Evaluation
) -> tuple[dict[str, Tensor], Evaluation]:
    """What a method's sequence adds to each weight, and the evaluation after it; `lm` is left as it was."""
    paths = editor.paths(lm)
    start = {path: lm.weight(path).clone() for path in paths}
    with lm.scratch(paths):
        for _, state in edit_sequence(lm, editor, [case.request for case in cases], given, batch):
            pass
        if last := editor.finish(lm, state):
            last.apply(lm)
        return {path: (lm.weight(path) - start[path]).double() for path in paths}, evaluate(lm, cases, before=before)


def _norm(updates: dict[str, Tensor]) -> float:
    return sum(delta.square().sum().item() for delta in updates.values()) ** 0.5


def beside(records: pd.DataFrame, options: Sequence[str] = tuple(NAMED)) -> pd.DataFrame:
    """Percent of cases with the default and with the option, one row per option and metric: method (the option),
    metric, default, option, and their difference in points with a 95 % bootstrap interval over cases (low, high)."""
    found, rows = summarize(records).set_index("method"), []
    for option in options:
        for row in paired_differences(records, option, default_of(option)).itertuples():
            sides = {"default": found[row.metric][default_of(option)], "option": found[row.metric][option]}
            rows.append(
                {"method": option, "metric": row.metric}
                | sides
                | {"difference": row.difference, "low": row.low, "high": row.high}
            )
    return pd.DataFrame(rows)


def specificities(records: pd.DataFrame) -> pd.DataFrame:
    """ZsRE's specificity by method, in percent, under both readings: against the ground truth (released code), and
    against the model's own answer before the edit (MetaKE v3 eq. 105), which is 100 % for the unedited model by
    definition."""
    found = summarize(records[records.dataset.str.contains("ZsRE")])
    own = found.specificity_pre_edit.where(found.method != "pre-edit", 100.0)
    shown = pd.DataFrame(
        {"method": found.method, "against the ground truth": found.specificity, "against its own answer before": own}
    )
    shown.attrs = {k: records.attrs[k] for k in ("label", "provenance") if k in records.attrs}
    return shown


def ceiling(model: str = "tiny", data: str = "facts-zsre") -> pd.DataFrame:
    """The best ZsRE specificity that is left when a token that cannot be right is counted into every answer.

    The mean of T/(T+1) over unrelated questions whose answers have T tokens, in percent, beside 100.
    """
    lm = load(model)
    lengths = pd.Series(
        [
            len(prompted(lm.tokenizer, p.prompt, p.target, p.seam)[1])
            for case in read_cases(data)
            for p in case.probes
            if p.kind == "neighborhood"
        ]
    )
    counts = lengths.value_counts().sort_index()
    rows = [
        {"tokens of the answer": str(length), "questions": int(count), "best possible": 100 * length / (length + 1)}
        for length, count in counts.items()
    ]
    return pd.DataFrame(
        [
            *rows,
            {
                "tokens of the answer": "all", "questions": len(lengths),
                "best possible": (100 * lengths / (lengths + 1)).mean()
            },
        ]
    )


def by_token(
    model: str = "tiny", method: str = "memit", edits: int = 12, data: str = "facts", seed: int = 0
) -> pd.DataFrame:
    """CounterFact's scores by two definitions, on the same edited model: ROME's, whose answers compete by their mean
    log-probability, and EMSEdit's, whose scored answer is forced and at each of its tokens compared with the token that
    the other answer has there, up to the shorter one's end; the score is the share of tokens.

    One row per probe with a rival: kind, tokens (of the shorter answer), both scores as shares.
    """
    lm = load(model)
    cases = select(lm, read_cases(data), edits, seed)
    editor = methods.method(method, model, seed=seed)
    edit = editor.edit(lm, [case.request for case in cases], statistics(lm, layers=editor.layers))
    with edit.applied(lm):
        whole = evaluate(lm, cases)
        probes = [p for case in cases for p in case.probes if p.kind in NAMES]
        scores = [p.score for case in whole.cases for p in case.probes]
        rows = [
            {"kind": NAMES[p.kind], **_shared(lm, p), "mean log-probability": score}
            for p, score in zip(probes, scores, strict=True)
            if p.rival is not None
        ]
    return pd.DataFrame(rows)


def _shared(lm: LanguageModel, probe: Probe) -> dict[str, float]:
    """Of one probe: tokens that both answers have, and the share of them at which the scored answer's is likelier."""
    both = (prompted(lm.tokenizer, probe.prompt, text, probe.seam) for text in (probe.target, probe.rival))
    (start, ours), (_, other) = both
    count = min(len(ours), len(other))
    columns = torch.arange(len(start) - 1, len(start) - 1 + count, device=lm.device)
    with torch.no_grad():
        logits = lm.logits(pad([start + ours[: count - 1]], lm.device), torch.zeros_like(columns), columns)
    wins = [bool(row[a] > row[b]) for row, a, b in zip(logits, ours, other, strict=False)]
    return {"tokens": count, "token by token": sum(wins) / count}


def definitions(records: pd.DataFrame) -> pd.DataFrame:
    """Both scores in percent, by kind and by whether the answers have one token or more."""
    length = records.tokens.map(lambda n: "one token" if n == 1 else "more").rename("shorter answer")
    grouped = records.groupby(["kind", length], sort=False)
    found = 100 * grouped[["mean log-probability", "token by token"]].mean()
    return found.assign(probes=grouped.size()).reset_index()


def judge(changes: pd.DataFrame) -> dict[str, Any]:
    """Whether taking the other side of a difference writes another update: holds if every option is further than
    `MATTERS` from its default, does not hold if none is, inconclusive if some are. Only where code was released."""
    released = changes[[NAMED[option].default != "ours" for option in changes.option]]
    others = [
        opposite(equal(row.option, row.change, MATTERS))._replace(error="resolution") for row in released.itertuples()
    ]
    told = ", ".join(
        f"{row.option} {100 * row.change:.{0 if row.change > MATTERS else 1}f} %" for row in released.itertuples()
    )
    found = for_and_against(all_of(others), all_of(map(opposite, others)))
    return found.verdict(f"relative change of the update: {told}")
