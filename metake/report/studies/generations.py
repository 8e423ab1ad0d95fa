"""What edited models write, one method below the other: the new object is boxed, the old one underlined;
and how often each appears."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Callable
from html import escape
from typing import Any

import matplotlib as mpl
import pandas as pd

from metake.report.figure import Figure
from metake.report.plots import _require, _soft
from metake.report.shown import LABELS, Shown, badge
from metake.report.style import in_order, style

WIDTH = 100  # characters of a line in text/plain
LOOK = (  # by shape, never by color alone; nothing here depends on the theme
    "<style>.metake-generations section{margin:0 0 1.4rem;overflow-wrap:anywhere}"
    ".metake-generations section>p{margin:0 0 .5rem}"
    ".metake-generations dl{display:grid;grid-template-columns:minmax(6.5em,max-content) 1fr;gap:.45rem 1rem;margin:0}"
    ".metake-generations dt{font-weight:600;border-left:.3em solid;padding-left:.5em}.metake-generations dd{margin:0}"
    ".metake-generations small{display:block;opacity:.8}"
    ".metake-generations mark{background:rgba(0,167,107,.16);color:inherit;font-weight:700;"
    "border:1.5px solid;border-radius:.25em;padding:0 .2em}"
    ".metake-generations u{font-style:italic;text-decoration:underline dotted 2px;text-underline-offset:.2em}"
    "@media(max-width:36em){.metake-generations dl{grid-template-columns:1fr}}</style>"
)


def whole_words(*answers: str) -> re.Pattern[str]:
    """Finds any of the answers as whole words, capitals or not; group n is the n-th.
    Texts are expected NFKD-normalized, as `sample` gives them."""
    forms = [(i, unicodedata.normalize("NFKD", answer)) for i, answer in enumerate(answers)]
    longest_first = sorted(forms, key=lambda form: -len(form[1]))
    return re.compile(
        r"(?<!\w)(?:" + "|".join(f"(?P<a{i}>{re.escape(form)})" for i, form in longest_first) + r")(?!\w)",
        re.IGNORECASE,
    )


def marked(
    text: str, new: str, old: str, kept: Callable[[str], str], boxed: Callable[[str], str], lined: Callable[[str], str]
) -> str:
    """A text with each stretch shown: the new object by `boxed`, the old one by `lined`, the rest by `kept`."""
    parts, at = [], 0
    for match in whole_words(new, old).finditer(text):
        parts += [kept(text[at : match.start()]), (boxed if match["a0"] else lined)(match[0])]
        at = match.end()
    return "".join((*parts, kept(text[at:])))


def generations(records: pd.DataFrame, everything: bool = False) -> Shown:
    """What the unedited and each edited model write, per case and prompt, with the edit's probabilities and outcome.

    records: as `case_study` returns them; of the cases marked `shown`, or of all if `everything`.
    The texts are escaped: a model may write markup.
    """
    _require(records, "method", "id", "shown", "prompt", "text", "target", "old", "p_target", "p_old", "success")
    label, origin = records.attrs.get("label", "recomputed"), records.attrs.get("provenance")
    rows = records if everything else records[records.shown]
    html, plain = [], []
    for (_, prompt), group in rows.groupby(["id", "prompt"], sort=False):
        first = group.iloc[0]
        own = {row["method"]: row for row in group.to_dict("records")}
        html.append(
            f"<section><p><strong>{escape(prompt)} … <mark>{escape(first.target)}</mark> instead of "
            f"<u>{escape(first.old)}</u></strong></p><dl>"
        )
        plain.append(f"{prompt} … «{first.target}» instead of ‹{first.old}›")
        for method in in_order(own):
            row = own[method]
            told, text = _told(row), " ".join(_legible(row["text"]).split())
            shown = marked(
                text, row["target"], row["old"], escape, lambda t: f"<mark>{escape(t)}</mark>",
                lambda t: f"<u>{escape(t)}</u>"
            )
            name = f'<dt style="border-color:{style(method).color}">{escape(style(method).name)}</dt>'
            html.append(f"{name}<dd>{shown}<small>{escape(told)}</small></dd>")
            body = marked(text, row["target"], row["old"], str, "«{}»".format, "‹{}›".format)
            plain += [
                f"  {style(method).name}: {told}",
                *textwrap.wrap(body, WIDTH, initial_indent="    ", subsequent_indent="    "),
            ]
        html.append("</dl></section>")
    note = (
        '<p class="metake-note"><mark>boxed</mark>: the new object. <u>underlined</u>: the old one. '
        f"{badge(label, origin)}</p>"
    )
    text = "\n".join([f"Generations, «new object», ‹old object› [{LABELS[label]}]", *plain])
    return Shown(f'{LOOK}<div class="metake-generations">{"".join(html)}{note}</div>', text)


def _told(row: dict[str, Any]) -> str:
    outcome = "not edited" if row["method"] == "pre-edit" else "edit succeeded" if row["success"] else "edit failed"
    return f"{outcome}: p(new) {row['p_target']:.3f}, p(old) {row['p_old']:.3f}"


def _legible(text: str) -> str:
    """Line ends and what cannot be printed become signs: a degenerate text is to be seen as one."""
    return "".join(c if c.isprintable() else " ⏎ " if c == "\n" else " " if c.isspace() else "�" for c in text)


def target_shares(summary: pd.DataFrame, model: str | None = None, name: str = "case_study") -> Figure:
    """Continuations with the new object (marker, 95 % interval) and with the old one (bar mark), per method.

    summary: method, cases, target, low, high, old_object, all but the first two in percent.
    """
    _require(summary, "method", "cases", "target", "low", "high", "old_object")
    own = summary.set_index("method").loc[in_order(summary.method)]

    def draw(axes: Any) -> None:
        for place, (method, row) in enumerate(own.iterrows()):
            look = style(method)
            axes.plot(
                [row.low, row.high], [place, place], color=look.color, linewidth=2.4, alpha=0.55, solid_capstyle="round"
            )
            axes.plot(row.target, place, color=look.color, marker=look.marker, markersize=9, linestyle="")
            axes.plot(
                row.old_object, place, color=_soft(0.85), marker="|", markersize=14, markeredgewidth=2, linestyle=""
            )
        axes.set(
            xlim=(-2, 102), xlabel="continuations of the edited prompt that name the object, %",
            ylim=(len(own) - 0.4, -0.6)
        )
        axes.set_yticks(range(len(own)), [style(m).name for m in own.index])
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        new, old = (
            {"color": _soft(1), "marker": marker, "markersize": size, "markeredgewidth": 2}
            for marker, size in (("o", 7), ("|", 12))
        )
        handles = [
            mpl.lines.Line2D([], [], linewidth=2.4, label="new object, with 95 % interval", **new),
            mpl.lines.Line2D([], [], linestyle="", label="old object", **old),
        ]
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)

    told = "; ".join(
        f"{style(m).name}: new {r.target:.0f} [{r.low:.0f}, {r.high:.0f}], old {r.old_object:.0f}"
        for m, r in own.iterrows()
    )
    alt = (
        f"Percent of {own.cases.iloc[0]} continuations in which the new and the old object appear, per method. {told}."
    )
    return Figure(draw, summary, name, alt, model, summary, (7.2, 1.1 + 0.36 * len(own)), 1)
