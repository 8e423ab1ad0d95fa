"""The methods as parts, in words, read off the editors themselves; and what each hands from one batch to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from metake import methods
from metake.algebra.geometry import Conditioned, Dense, MetricRule, inverse_covariance, isotropic, null_space
from metake.algebra.postprocess import PostProcess, cap_spectrum, keep_largest, soften_principal
from metake.data.facts import facts
from metake.editing.editor import Editor, even, root, whole
from metake.editing.gradient.editor import GradientEditor
from metake.editing.statistics import statistics
from metake.experiments.runs import edit_sequence
from metake.language.model import load

SITES = {
    "block": "output of the block", "mlp": "output of the MLP",
    "mlp+attention": "outputs of MLP and attention, of which the MLP's is written"
}
SHARES = {even: "1/(layers left)", root: "1/√(layers left)", whole: "all"}
TOKENS = {"all": "every token", "answer": "what comes before the answer's tokens"}
WHEN = {"layer": "before each layer is written", "batch": "after each batch", "sequence": "once, after the last batch"}


def metric_in_words(rule: MetricRule) -> str:
    """The metric Q of a rule, with its numbers."""
    match rule:
        case inverse_covariance(weight=1.0, ridge=0.0):
            return "C⁻¹"
        case inverse_covariance(weight=weight, ridge=0.0):
            return f"(λC)⁻¹, λ = {weight:g}"
        case inverse_covariance(weight=weight, ridge=ridge):
            return f"(λC + ρI)⁻¹, λ = {weight:g}, ρ = {ridge:g}"
        case null_space(threshold=threshold, ridge=ridge):
            return f"P/λ, λ = {ridge:g}, P onto eigenvalues of C below {threshold:g}"
        case isotropic(ridge=ridge):
            return "I" if ridge == 1 else f"I/λ, λ = {ridge:g}"
    return repr(rule)


def post_in_words(rule: PostProcess) -> str:
    """What a post-process does to a finished update, and when."""
    match rule:
        case keep_largest():
            text = f"of each weight only the {100 * rule.share:.0f} % largest relative changes"
        case cap_spectrum():
            twice = ", and added a second time" * rule.add_twice
            text = f"singular values of the change capped by the weight's largest, logarithm beyond{twice}"
        case soften_principal():
            side = "" if rule.side == "key" else " of the output side"
            text = (
                f"{100 * rule.strength:.0f} % of what lies along the weight's principal directions{side} "
                f"({100 * rule.ratio:.0f} % of its spectrum) taken out"
            )
        case _:
            text = repr(rule)
    return f"{text}, {WHEN[rule.when]}"


def planned(editor: Editor) -> dict[str, str]:
    """Where an editor's targets stand and how their residuals are shared out, in words."""
    layers = [str(layer) for layer in editor.layers]
    target = SITES[editor.target.site] + (
        ", each layer's own" if editor.own_targets else "" if len(layers) == 1 else ", the last layer's for all"
    )
    refined = None
    if rule := editor.refine:
        through = {"last": "the last layer's gate", "whole": "the whole edit"}[rule.look_ahead]
        steps = f"look-ahead steps of {rule.step_size:g}" if rule.optimizer != "lbfgs" else "plans of a line search"
        refined = f"{rule.steps} {steps} through {through}"
    share = "all" if len(layers) == 1 else SHARES.get(editor.allocation, editor.allocation.__name__)
    return {"layers": ", ".join(layers), "target": target, "refined by": refined, "share of the residual": share}


def written(editor: Editor) -> dict[str, str]:
    """How an editor writes: the metric, how exactly, with what memory, and what is done to the update, in words."""
    exact = "exact (ν = 0)" if editor.noise == 0 else f"compromise (ν = {editor.noise:g})"
    solved = {None: "whole batch", 1: "one request"}.get(editor.together, f"{editor.together} requests")
    return {
        "metric Q": metric_in_words(editor.metric), "write": exact + ", at the plain prompt's key" * editor.plain,
        "solved together": solved,
        "remembers": "keys of earlier batches" if editor.remember else None,
        "afterwards": "; ".join(map(post_in_words, editor.post)) or None,
    }  # fmt: skip


def gradients(editor: GradientEditor) -> dict[str, str]:
    """What an editor of the gradient family makes R, M and Q of, in words."""
    rule = editor.rule
    sign = "" if rule.added else "−"
    learned = bool(editor.networks)
    hat = "\u0303" if learned else "\u0302"  # a tilde: a network's; a hat: normalized
    coefficient = {"raw": f"k·k{hat}", "normalized": f"k{hat}·k{hat}"}[rule.coefficient]
    if rule.solve == "sum":
        rows, metric = f"{sign}η g{hat}", f"none: Δ = R·K{hat}, nothing is solved"
    else:
        rows, metric = f"{sign}η ({coefficient}) g{hat}", "I/λ, λ learned" if learned else "I"
    moments = "all edits so far" if rule.living else "the training"
    return {
        "linear maps": ", ".join(editor.modules), "rows of R": rows, "metric Q": metric,
        "k, g read": f"{rule.steps} time{'s' * (rule.steps > 1)}, at {TOKENS[rule.tokens]}",
        "normalized by": moments, "learned": {"kl": "with KL", "norm": "with ‖Δ‖²"}[rule.penalty] if learned else None,
    }  # fmt: skip


def parts(
    model: str = "tiny", names: Sequence[str] = tuple(methods.METHODS),
    side: Callable[[Any], dict[str, str]] = planned
) -> pd.DataFrame:
    """One row per method: the parts of its editor for `model`, in words; side: `planned`, `written`, or of the other
    family `gradients`."""
    return pd.DataFrame([{"method": name} | side(methods.method(name, model)) for name in names])


def kept(
    model: str = "tiny", names: Sequence[str] = tuple(methods.METHODS), batch: int = 2, seed: int = 0
) -> pd.DataFrame:
    """What each method's state holds after two batches, and what its end of a sequence then still changes.

    One row per method: keys remembered a layer, copies of original weights, running sums of updates, and whether
    `finish` has something to do. The targets are cut to one step: only the state is looked at.
    """
    lm = load(model)
    requests = [case.request for case in facts(limit=2 * batch)]
    editors = {name: methods.method(name, model, seed=seed) for name in names}
    given = statistics(lm, layers=sorted({layer for editor in editors.values() for layer in editor.layers}))
    rows = []
    for name, editor in editors.items():
        editor = replace(
            editor, target=replace(editor.target, steps=1), refine=editor.refine and replace(editor.refine, steps=0),
            contexts=("{}",)
        )
        with lm.scratch([lm.write_path(layer) for layer in editor.layers]):
            *_, (_, state) = edit_sequence(lm, editor, requests, given, batch)
            last = editor.finish(lm, state)
        metric = state.metrics[editor.layers[-1]]
        thin = isinstance(metric, Conditioned)
        past = len(metric.past_metric) if thin else "as a matrix" if isinstance(metric, Dense) else 0
        row = {
            "method": name, "edits": state.edits, "keys remembered a layer": past,
            "copies of weights": len(state.original)
        }
        rows.append(row | {"sums of updates": len(state.totals), "acts at the end": last is not None})
    return pd.DataFrame(rows)
