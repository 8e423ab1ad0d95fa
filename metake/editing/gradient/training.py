"""Training the networks of the gradient family: edit, look at the edited model, and follow the one meta-gradient.

Slopes K, g are constants, so that the gradient of the outer loss L in a network's parameters φ is that of ⟨G, Δ(φ)⟩
with G = ∂L/∂W of the edited weight (MALMEN's decoupling; MEND's full back-propagation gives the same number). With X, γ
the slopes of the outer rows, G = γᵀX, and ⟨G, R·M⟩ = Σ (γR) ⊙ (XMᵀ): G is never formed. Of several steps each one's
slopes depend on the networks of those before; that path is left out, as published (first order).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metake.algebra.update import LayerUpdate
from metake.data.requests import Cases, EditCase, Probe
from metake.editing.gradient.editor import PLAIN, GradientEditor, corrected
from metake.editing.gradient.network import Network, shapes
from metake.editing.gradient.rule import GradientRule, factors
from metake.editing.gradient.slopes import Passes, Slopes
from metake.editing.gradient.stored import checkpoint, finished, resumed, save
from metake.editing.record import describe, digest_of
from metake.language.model import LanguageModel
from metake.language.tokens import Row, prompted, rewriting_rows
from metake.support.errors import NumericalError, ParameterError, near_misses
from metake.support.machine import versions
from metake.support.progress import progress
from metake.support.storage import held

OUTER = ("both", "prompt", "paraphrase")
Pair = tuple[Tensor, Tensor]  # R and M


@dataclass(frozen=True)
class Training:
    """How networks are trained.

    edits, steps: facts a step, and steps; accumulate: gradients that make one step of the optimizer; step: η to begin
    with, of all J steps together; rate: of the networks, Adam; step_rate: of steps η and ridges, whose unit is their
    own (a rate of 0: they stay as they are); keep: weight of the penalty, drift summed over requests or ‖Δ‖²; clip: of
    the gradient's norm; rank, blocks: of the networks; every: steps after which a checkpoint is written; outer: what
    the outer loss asks for the target, "both" the edited prompt and a paraphrase, or one of the two.
    """

    edits: int = 20
    steps: int = 60
    seed: int = 0
    accumulate: int = 1
    step: float = 4e-4
    rate: float = 1e-3
    step_rate: float = 2e-5
    keep: float = 0.5
    clip: float = 1.0
    rank: int = 64
    blocks: int = 2
    every: int = 20
    outer: str = "both"

    def __post_init__(self) -> None:
        if self.outer not in OUTER:
            raise ParameterError(near_misses(self.outer, OUTER, "value of outer"))
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("keep", "rate", "step_rate") and not value >= 0:
                raise ParameterError(f"{f.name} must not be below 0; found {value}")
            if f.name not in ("seed", "keep", "rate", "step_rate", "outer") and not value > 0:
                raise ParameterError(f"{f.name} must be above 0; found {value}")


def train(
    lm: LanguageModel, cases: Cases, rule: GradientRule, modules: Sequence[str], training: Training = Training(),
    exclude: Sequence[str] = (), out: str | Path | None = None
) -> GradientEditor:
    """An editor whose networks are trained on these cases; `lm` is bit-identical on return, also if this raises.

    Every step draws `edits` cases, edits them, and follows the outer loss of the edited model: mean −log p of the
    target after the edited prompt and one of its paraphrases, and the rule's penalty. Needs cases with a paraphrase,
    and for "kl" a neighbor.
    exclude: ids that training must not see, kept for evaluation. out: folder of the editor, with a checkpoint after
    every few steps, from which a further call with the same settings goes on; one that is finished is read.
    Raises ParameterError for too few cases, or a folder of other settings; NumericalError if a loss is not finite.
    """
    kept = [c for c in cases if c.request.id not in set(exclude)]
    usable = [c for c in kept if _probes(c, "paraphrase") and (rule.penalty != "kl" or _probes(c, "neighborhood"))]
    if len(usable) < training.edits:
        raise ParameterError(
            f"{training.edits} cases a step were asked for, but only {len(usable)} of {len(cases)} can be trained on: "
            f"{len(cases) - len(kept)} are kept for evaluation, the others lack a paraphrase or a neighbor"
        )
    made = begin(lm, rule, tuple(modules), training)
    told = _told(lm, made, training, usable)
    with held(out, wait=False) if out else contextlib.nullcontext():
        if out and (done := finished(out, told)):
            return done
        optimizer = _optimizer(made, training)
        losses = resumed(out, told, made, optimizer)
        with lm.scratch(made.modules):
            for number in progress(range(len(losses), training.steps), "train"):
                losses.append(_step(lm, made, training, usable, number, optimizer))
                if out and ((number + 1) % training.every == 0 or number + 1 == training.steps):
                    checkpoint(Path(out), told, made, optimizer, losses)
        done = replace(made, trained=told | {"losses": losses})
        if out:
            save(done, out)
        return done


def begin(lm: LanguageModel, rule: GradientRule, modules: tuple[str, ...], training: Training) -> GradientEditor:
    """The editor before training: networks that are the identity, on the model's device."""
    sizes = [lm.shape(path) for path in modules]
    wide = torch.promote_types(lm.dtype, torch.float32)
    networks = tuple(
        tuple(
            Network(
                sum(size), sizes.count(size), training.rank, training.blocks, training.step / rule.steps, rule.inside,
                training.seed + 1000 * j + i, wide
            ).to(lm.device)
            for i, size in enumerate(shapes(sizes))
        )
        for j in range(rule.steps)
    )
    return GradientEditor(modules, rule, networks, seed=training.seed)


def _told(lm: LanguageModel, made: GradientEditor, training: Training, cases: Sequence[EditCase]) -> dict[str, Any]:
    """What a trained editor's record says of how it came about, but for the losses."""
    return {
        "training": asdict(training), "rule": describe(made.rule), "modules": list(made.modules), "base": lm.base(),
        "weights": {path: lm.digest(path) for path in made.modules}, "ids": [c.request.id for c in cases],
        "requests_digest": digest_of([c.request for c in cases]), "versions": versions(),
    }


def _optimizer(made: GradientEditor, training: Training) -> torch.optim.Optimizer:
    groups = [network.groups() for step in made.networks for network in step]
    parts = zip(zip(*groups, strict=True), (training.rate, training.step_rate), strict=True)
    return torch.optim.Adam([{"params": [p for own in part for p in own], "lr": rate} for part, rate in parts])


def _step(
    lm: LanguageModel, made: GradientEditor, training: Training, cases: Sequence[EditCase], number: int,
    optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    """One step of the optimizer: the outer losses, before and after the edits, means over requests."""
    optimizer.zero_grad()
    found = []
    for part in range(training.accumulate):
        draw = random.Random(f"{training.seed}/{number}/{part}")
        batch = draw.sample(list(cases), training.edits)
        found.append(meta_gradient(lm, made, batch, training, draw))
    own = [p for group in optimizer.param_groups for p in group["params"]]
    for p in own:
        p.grad = None if p.grad is None else p.grad / training.accumulate
    torch.nn.utils.clip_grad_norm_([p for p in own if p.grad is not None], training.clip)
    optimizer.step()
    mean = {key: sum(one[key] for one in found) / len(found) for key in found[0]}
    if bad := [key for key, value in mean.items() if value != value or abs(value) == float("inf")]:
        raise NumericalError(f"training is not finite at step {number} ({', '.join(bad)}): try a smaller step or rate")
    return mean


@LanguageModel.entry(gradients=True)
def meta_gradient(
    lm: LanguageModel, made: GradientEditor, batch: Sequence[EditCase], training: Training, draw: random.Random
) -> dict[str, float]:
    """Add the gradient of one batch's outer loss to the networks' parameters; the model is left as it was.

    Returns means over the requests: "before", −log p of the target after the edited prompt before the edit; "after", of
    prompt and paraphrase after it; "drift"; "norm", ‖Δ‖.
    Cost: J + 1 forwards and backwards; for "kl" a forward of the unedited model.
    """
    outer = Passes(lm, outer_rows(lm, batch, made.rule.penalty, draw, training.outer), "all")
    keep, held = training.keep, made.rule.penalty == "kl"
    if held:
        outer.losses()  # what the model says before the edit: the drift is from it
    with lm.scratch(made.modules):
        inner = Passes(lm, rewriting_rows(lm.tokenizer, [c.request for c in batch], PLAIN), made.rule.tokens)
        before, pairs = _applied(lm, made, inner)
        after, slopes = outer.slopes(made.modules, keep if held else 0.0)
    surrogate = sum(_inner(slopes[path], left, right) for path, steps in pairs.items() for left, right in steps)
    norm = sum(_square(steps) for steps in pairs.values())
    (surrogate + (keep * norm if made.rule.penalty == "norm" else 0.0)).backward()
    sums = {"before": before, "after": after[:, 0], "drift": after[:, 1]}
    return {name: t.sum().item() / len(batch) for name, t in sums.items()} | {"norm": float(norm.detach()) ** 0.5}


def _applied(lm: LanguageModel, made: GradientEditor, inner: Passes) -> tuple[Tensor, dict[str, list[Pair]]]:
    """Edit the model step by step: each request's −log p before, and the steps' R and M of each weight, with graph."""
    before: list[Tensor] = []
    pairs: dict[str, list[Pair]] = {path: [] for path in made.modules}
    places = made.places(lm)
    for networks in made.networks:
        losses, slopes = inner.slopes(made.modules)
        before.append(losses[:, 0])
        for path, own in slopes.items():
            networks[places[path][0]].see(own.rows)
        for path, own in slopes.items():
            shape, place = places[path]
            left, right = factors(made.rule, own, corrected(networks[shape], own, place))
            pairs[path].append((left, right))
            lm.add(path, LayerUpdate(path, left.detach(), right.detach()))
    return before[0], pairs


def _inner(slopes: Slopes, left: Tensor, right: Tensor) -> Tensor:
    """⟨G, R·M⟩ with G = γᵀX of these slopes."""
    return ((slopes.gradients.double() @ left) * (slopes.keys.double() @ right.T)).sum()


def _square(steps: Sequence[Pair]) -> Tensor:
    """‖Δ‖² of the sum of the steps, from the thin factors."""
    left, right = torch.cat([r for r, _ in steps], 1), torch.cat([m for _, m in steps])
    return ((left.T @ left) * (right @ right.T)).sum()


def outer_rows(
    lm: LanguageModel, batch: Sequence[EditCase], penalty: str, draw: random.Random, outer: str = "both"
) -> list[Row]:
    """What the outer loss reads of each case: the edited prompt and one paraphrase with the target, half each, or one
    of the two (`Training.outer`); for "kl" one neighbor's whole distributions where its own answer stands."""
    rows, asked = [], 2 if outer == "both" else 1
    if outer != "paraphrase":
        own = rewriting_rows(lm.tokenizer, [c.request for c in batch], PLAIN)
        rows = [row._replace(weight=row.weight / asked) for row in own]
    for i, case in enumerate(batch):
        if outer != "prompt":
            rows.append(_probe_row(lm, i, draw.choice(_probes(case, "paraphrase")), case.request.target, asked))
        if penalty == "kl":
            near = draw.choice(_probes(case, "neighborhood"))
            rows.append(_probe_row(lm, i, near, near.target, 1)._replace(labels=()))
    return rows


def _probe_row(lm: LanguageModel, request: int, probe: Probe, text: str, share: int) -> Row:
    ids, answer = prompted(lm.tokenizer, probe.prompt, text, probe.seam)
    read = tuple(range(len(ids) - 1, len(ids) - 1 + len(answer)))
    return Row(request, ids + answer[:-1], len(ids) - 1, read, answer, 1 / (share * len(answer)))


def _probes(case: EditCase, kind: str) -> list[Any]:
    return [probe for probe in case.probes if probe.kind == kind]
