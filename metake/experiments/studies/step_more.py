"""SMEdit's claims A, B, C: what a second step of back-propagation gives, at equal specificity, beside two controls.

Each member is asked at several multiples of its step η. The controls: networks that have learned nothing, and networks
of which only η and λ have. Without them a larger η passes for a better editor: Adam raises η by its rate a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from metake import methods
from metake.data.requests import Cases
from metake.editing.gradient.editor import GradientEditor
from metake.editing.gradient.rule import GradientRule
from metake.editing.gradient.training import Training
from metake.experiments.cases import for_training, part_of, read_cases, select
from metake.experiments.decision import Decision, all_of, interval, one_and_none_against, undecided, with_interval
from metake.experiments.kept import kept
from metake.experiments.studies.comparison import labelled
from metake.experiments.studies.frontier import FACTORS, LEVEL, SCORES, Curves, Variant, swept
from metake.language.model import LanguageModel, load

UNTRAINED, FULL, LONG = 3, 60, 120  # batches: of moments alone, of the whole training, of one twice as long
ULTRAEDIT = "living"  # in the place of what learns: nothing does, and the moments go on
RECORDED: tuple[Variant, ...] = (
    *(Variant(j, "kl", "nothing", UNTRAINED) for j in (1, 2, 3, 4)),
    *(Variant(j, "none", ULTRAEDIT, 0) for j in (1, 2)),
    *(Variant(j, "kl", "network", FULL) for j in (1, 2, 4)),
    Variant(2, "norm", "network", FULL),
    *(Variant(j, p, "network", n) for n in (1, 10) for j, p in ((1, "kl"), (2, "kl"), (2, "norm"))),
    *(Variant(j, "kl", "step", FULL) for j in (1, 2)),
    Variant(2, "kl", "network", LONG),
)
"""Every variant of the recording; those that many questions need come first."""
LIVE = (*RECORDED[:2], *RECORDED[3:6], RECORDED[6], RECORDED[9])
"""Those that need no training: untrained ones, UltraEdit, and the two that ship with the package."""
LIVE_FACTORS = (0.35, 0.5, 0.7, 1.0, 1.5, 2.0, 4.0)
COLUMNS = ("variant", *Variant._fields, "seed", "factor", "id", *SCORES)


def label(variant: Variant) -> str:
    """A variant in words, which also tell variants apart."""
    steps = "1 step" if variant.steps == 1 else f"{variant.steps} steps"
    if variant.learns == ULTRAEDIT:
        return f"UltraEdit, {steps}"
    if variant.learns == "nothing":
        return f"untrained, {steps}"
    what = {"kl": "KL", "norm": "norm"}[variant.penalty] if variant.learns == "network" else "only η, λ"
    return f"{steps}, {what}, {variant.batches} batch{'es' * (variant.batches > 1)}"


def step_more(
    model: str = "tiny", variants: Sequence[Variant] = LIVE, cases: int = 40, seeds: Sequence[int] = (0,),
    factors: Sequence[float] = FACTORS, data: str = "facts", shipped: bool = True, out: str | Path | None = None,
    **training: Any
) -> pd.DataFrame:
    """Every variant at every multiple of its step: `cases` facts that no training has seen, drawn by the seed, in
    batches as large as those of the training, each on the unedited model.

    One row per variant, seed, factor and fact: the variant's parts, and the three scores as shares.
    shipped: take the editors that ship with the package for the two that it has, instead of training them; training:
    changes of all trainings (`methods.to_train`). out: folder of what is finished.
    """
    lm, rows = load(model), []
    choosing, testing = for_training(lm, data), part_of(read_cases(data), "testing")
    for variant in variants:
        for seed in seeds:
            asked = select(lm, testing, cases, seed)
            # what learns nothing has no penalty: its result stays when the weight of the others' changes
            idle = {"keep": 0.0} if variant.learns in ("nothing", ULTRAEDIT) else {}
            setting = methods.to_train(_named(variant), model, **{"seed": seed, **training, **idle})

            def make(variant=variant, setting=setting, asked=asked) -> list[dict[str, Any]]:
                editor = _editor(lm, model, variant, choosing, shipped, setting)
                return swept(lm, editor, asked, setting[2].edits, factors)

            told = (lm.base(), choosing.digest, [c.request.id for c in asked], variant, shipped, tuple(factors),
                    setting)  # fmt: skip
            parts = {"variant": label(variant), **variant._asdict(), "seed": seed}
            rows += [parts | row for row in kept(out, told, make)]
    frame = pd.DataFrame(rows)
    frame.attrs["settings"] = {"cases": cases, "seeds": list(seeds)} | training
    return frame


def _named(variant: Variant) -> str:
    """The method whose rule and training a variant changes."""
    return "smedit" if variant.penalty == "norm" else "malmen"


def _editor(
    lm: LanguageModel, model: str, variant: Variant, cases: Cases, shipped: bool,
    setting: tuple[GradientRule, Sequence[str], Training]
) -> GradientEditor:
    if variant.learns == ULTRAEDIT:
        own = methods.ultraedit(model)
        return replace(own, rule=replace(own.rule, steps=variant.steps, step=own.rule.step / variant.steps))
    name = _named(variant)
    usual = Variant(2 if name == "smedit" else 1, variant.penalty, "network", FULL)
    if shipped and variant == usual:
        return methods.method(name, model)
    return variant.made(lm, cases, *setting)


PAIRS: dict[str, dict[str, tuple[Variant, Variant]]] = {
    "low data": {
        f"SMEdit after {n} batch{'es' * (n > 1)} − MALMEN after {FULL}": (
            Variant(2, "norm", "network", n), Variant(1, "kl", "network", FULL)
        )
        for n in (1, 10)
    },
    "second step": {
        "MALMEN, 2 steps − 1": tuple(Variant(j, "kl", "network", FULL) for j in (2, 1)),
        "UltraEdit, 2 steps − 1": tuple(Variant(j, "none", ULTRAEDIT, 0) for j in (2, 1)),
    },
    "more steps": {
        f"MALMEN, 2 steps − {k}": tuple(Variant(j, "kl", "network", FULL) for j in (2, k)) for k in (1, 4)
    },
    "controls": {
        "untrained, 2 steps − 1": tuple(Variant(j, "kl", "nothing", UNTRAINED) for j in (2, 1)),
        "untrained, 4 steps − 2": tuple(Variant(j, "kl", "nothing", UNTRAINED) for j in (4, 2)),
        "only η and λ learned − nothing, 2 steps": (
            Variant(2, "kl", "step", FULL), Variant(2, "kl", "nothing", UNTRAINED)
        ),
        "all learned − nothing, 1 step": (
            Variant(1, "kl", "network", FULL), Variant(1, "kl", "nothing", UNTRAINED)
        ),
        "all learned − nothing, 2 steps": (
            Variant(2, "kl", "network", FULL), Variant(2, "kl", "nothing", UNTRAINED)
        ),
        f"all learned in {LONG} batches − nothing, 2 steps": (
            Variant(2, "kl", "network", LONG), Variant(2, "kl", "nothing", UNTRAINED)
        ),
    },
}  # fmt: skip
"""What is subtracted from what, per question: the three claims, and the controls."""


def compared(records: pd.DataFrame, question: str, level: float = LEVEL) -> pd.DataFrame:
    """A question's pairs at equal specificity, of those whose variants the records hold: a row per pair and score."""
    curves = Curves(records)
    pairs = {what: (label(a), label(b)) for what, (a, b) in PAIRS[question].items()}
    found = curves.differences({w: p for w, p in pairs.items() if set(p) <= set(curves.found)}, level)
    return labelled(found, records)


def same_step(records: pd.DataFrame) -> pd.DataFrame:
    """What claim C saw, untrained: J steps with the same η in each, so that J of them go J times as far, beside J steps
    that together go as far as one. Percent per J."""
    curves, rows = Curves(records), []
    for variant in (Variant(j, "kl", "nothing", UNTRAINED) for j in (1, 2, 3, 4)):
        if label(variant) not in curves.found:
            continue
        means = curves.mean(label(variant)).set_index("factor")
        for what, factor in (("η in each step", float(variant.steps)), ("η together", 1.0)):
            if factor in means.index:
                rows.append({"steps": variant.steps, "size": what, **means.loc[factor, list(SCORES)]})
    return labelled(pd.DataFrame(rows).sort_values(["size", "steps"], kind="stable"), records)


def shown(records: pd.DataFrame, what: str) -> list[str]:
    """Labels of the records' variants that are "untrained", or "ready": the package's own and UltraEdit."""
    own = records[(records.learns == "nothing") == (what == "untrained")]
    return list(own.variant.unique())


def more_steps(records: pd.DataFrame) -> pd.DataFrame:
    """The records of claims B and C: MALMEN by its steps, fully trained, and UltraEdit."""
    network = (records.learns == "network") & (records.penalty == "kl") & (records.batches == FULL)
    return labelled(records[network | (records.learns == ULTRAEDIT)], records)


def low_data(records: pd.DataFrame) -> pd.DataFrame:
    """The records of claim A: MALMEN and SMEdit by the batches of their training."""
    usual = ((records.steps == 1) & (records.penalty == "kl")) | (records.penalty == "norm")
    return labelled(records[usual & (records.learns == "network")], records)


def all_compared(records: pd.DataFrame) -> pd.DataFrame:
    """`compared` of every question: a column says which."""
    found = [compared(records, question).assign(question=question) for question in PAIRS]
    columns = ["question", "compared", "metric", "first", "second", "difference", "low", "high"]
    return labelled(pd.concat(found, ignore_index=True)[columns], records)


def as_trained(records: pd.DataFrame) -> pd.DataFrame:
    """Each variant at the step that it was trained to: percent, the mean over seeds of the means over facts, and the
    standard deviation over seeds."""
    own = records[records.factor == 1.0]
    by_seed = 100 * own.groupby(["variant", "seed"], sort=False)[list(SCORES)].mean()
    grouped = by_seed.groupby("variant", sort=False)
    return labelled(grouped.mean().join(grouped.std().add_suffix(", sd")).reset_index(), records)


def empty() -> pd.DataFrame:
    """No records: for a page whose recording is not made yet."""
    return pd.DataFrame(columns=list(COLUMNS))


def decide(found: pd.DataFrame) -> Decision:
    """Of every pair: is the first above the second in efficacy or generalization by an interval above zero, and in
    neither below?"""
    return all_of(
        one_and_none_against(
            undecided(f"{r.metric}, {r.compared}: one of them does not reach this specificity")
            if r.low != r.low else interval(f"{r.metric}, {r.compared}", r.difference, r.low, r.high)
            for r in own.itertuples()
        )
        for _, own in found.groupby("compared", sort=False)
    )


def judge(records: pd.DataFrame, question: str, level: float = LEVEL) -> dict[str, Any]:
    """A claim, pair by pair at equal specificity (of little data, the pair of one batch decides, as it is claimed):
    holds if of every pair the first is above the second in efficacy or generalization, with an interval above zero,
    and below in neither; does not hold if it is below in one."""
    found = compared(records, question, level)
    if question == "low data":
        found = found[found.compared == next(iter(PAIRS[question]))]
    if found.empty:
        return undecided("these records hold no pair of it").verdict("no pair of it is among the records")
    return decide(found).quiet().verdict(f"at a specificity of {level:.0f} %, in points: {told(found)}")


def told(found: pd.DataFrame) -> str:
    """Differences with their intervals, in words."""
    return "; ".join(
        f"{what}: " + ", ".join(
            f"{r.metric} " + ("not reached" if r.low != r.low
                              else with_interval(r.difference, r.low, r.high))
            for r in own.itertuples()
        )
        for what, own in found.groupby("compared", sort=False)
    )  # fmt: skip
