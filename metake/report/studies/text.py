"""What key statistics of growing texts give: where edits are written to, and the scores of edits made with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from metake.report.figure import Figure
from metake.report.plots import _require, _soft
from metake.report.style import in_order, style

SCORES = ("efficacy", "generalization", "specificity")
TURNED = {"memit": "MEMIT turned, °", "alphaedit": "AlphaEdit turned, °"}
ANGLES = {"mean angle, °": "-", "largest angle, °": ":"}


def text_curves(
    curves: pd.DataFrame, marks: Sequence[int] = (), model: str | None = None, name: str = "how_much_text"
) -> Figure:
    """Against the tokens for each dimension of a key: above, rank of the projector, its principal angles to the one
    from all of the text, and how far the direction is turned that a request is written along; below, the scores.

    curves: what `experiments.text_needed.curves` gives; marks: amounts with an upright line.
    """
    _require(curves, "multiple", "tokens", "method", "rank of P", *ANGLES, *TURNED.values(), *SCORES)
    amounts = curves.drop_duplicates("multiple").sort_values("multiple")
    told = "; ".join(
        f"{style(r.method).name}, {r.multiple} tokens: " + ", ".join(f"{s} {getattr(r, s):.0f}" for s in SCORES)
        for r in curves.itertuples()
    )
    alt = (
        "Rank of AlphaEdit's projector, its angles to the projector from all of the text, and the scores of edits, "
        f"against {amounts.multiple.iloc[0]} to {amounts.multiple.iloc[-1]} tokens for each dimension of a key. In "
        f"percent – {told}."
    )
    summary = amounts[["multiple", "tokens", "rank of P", "mean angle, °", *TURNED.values()]]
    panels = {"nrows": 2, "ncols": 3, "sharex": True}
    return Figure(
        lambda axes: _draw(axes, curves, amounts, marks), curves, name, alt, model, summary, (9.0, 5.4), 1, **panels
    )


def _draw(axes: Any, curves: pd.DataFrame, amounts: pd.DataFrame, marks: Sequence[int]) -> None:
    methods = in_order(curves.method)
    looks = {m: {"color": style(m).color, "marker": style(m).marker, "linestyle": style(m).line} for m in methods}
    axes[0, 0].plot(amounts.multiple, amounts["rank of P"], markersize=5, **looks["alphaedit"])
    axes[0, 0].set_title("rank of P")
    for column, line in ANGLES.items():
        look = looks["alphaedit"] | {"linestyle": line, "label": column.partition(" ")[0]}
        axes[0, 1].plot(amounts.multiple, amounts[column], markersize=5, **look)
    axes[0, 1].set_title("principal angles, °")
    axes[0, 1].legend()
    for k, method in enumerate(methods):  # later ones slimmer: equal curves show both
        own, slim = curves[curves.method == method].sort_values("multiple"), 7 - 2 * k
        look = looks[method] | {"linewidth": 2.4 - 0.8 * k}
        axes[0, 2].plot(amounts.multiple, amounts[TURNED[method]], markersize=5, **looks[method])
        for here, score in zip(axes[1], SCORES, strict=True):
            here.plot(own.multiple, own[score], markersize=slim, label=style(method).name, **look)
    axes[0, 2].set_title("writing turned by, °")
    for here, score in zip(axes[1], SCORES, strict=True):
        here.set(title=f"{score}, %", ylim=(-4, 104), yticks=(0, 25, 50, 75, 100))
    for here in axes.flat:
        here.set_xscale("log")
        here.set_xticks(list(amounts.multiple), labels=[str(m) for m in amounts.multiple])
        here.minorticks_off()
        for mark in marks:
            here.axvline(mark, color=_soft(0.8), linewidth=1.5, linestyle=":", zorder=1.5)
    axes[1, 1].set_xlabel("tokens for each dimension of a key")
    axes[1, 0].figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(methods))
