"""Things with two faces: markup for the page, rounded plain text for the tests. Tables, verdicts, provenance stamps."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from types import MappingProxyType
from typing import Any

import pandas as pd

from metake.report.files import DEFAULT, artifact_name, own_folder, portable
from metake.report.style import METHOD_STYLE, style
from metake.support.errors import ParameterError, ProvenanceError, near_misses
from metake.support.storage import write_file

LABELS = {"recomputed": "recomputed here", "recorded": "recorded", "reported": "reported in the paper"}
VERDICTS = {True: ("holds", "yes"), False: ("does not hold", "no"), None: ("inconclusive", "open")}
STABLE = ("model", "model_digest", "dataset", "dataset_digest", "data", "data_digest", "seed", "seeds", "edits", "n")
SHOWN = {
    "method": lambda v: style(v).name, "label": lambda v: LABELS.get(v, v),
    "dataset": lambda v: {"counterfact": "CounterFact", "zsre": "ZsRE"}.get(v, v),
    "direction": lambda v: {
        "exact": "exact g", "proxy": "proxy ĝ", "key_only": "key-only proxy", "none": "no update",
        "equal_proxy": "proxy ĝ, as long as g", "equal_key_only": "key-only proxy, as long as g",
    }.get(v, v),
    "metric": lambda v: {"log_p": "log p", "log_p_paraphrase": "log p of paraphrases"}.get(v, v),
}
"""What a column's values are called: the names that code gives them never reach a reader."""
NOISE = 1e-9  # digits below it are rounding errors, which differ between machines
FAR = 1e12  # a margin beyond it is written as this
LINES = 40  # of a long text/plain
LONG = 32  # characters of a cell that would be one word a line on a phone


@dataclass
class Shown:
    """What a cell shows."""

    html: str
    text: str

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/html": self.html, "text/plain": self.text}

    def __str__(self) -> str:
        return self.text


STAMPED = ("model", "dataset", "date", "commit")
LITERAL = "read literally"


def texts(column: pd.Series, digits: int) -> list[str]:
    """One column as text: `digits` decimals, or significant digits if they would hide some of it."""
    column = column.infer_objects()
    if pd.api.types.is_bool_dtype(column):
        return ["yes" if v else "no" for v in column]
    if not pd.api.types.is_numeric_dtype(column):
        name = SHOWN.get(str(column.name), str)
        return ["–" if v is None or v is pd.NA or v != v else str(name(v)) for v in column]
    if pd.api.types.is_integer_dtype(column):
        return ["–" if v is pd.NA else str(v) for v in column]
    sizes = column.abs()[column.abs() >= NOISE]
    form = (
        f".{digits}f" if sizes.empty or (sizes.min() >= 10**-digits and sizes.max() < 1e6) else f"#.{max(digits, 3)}g"
    )
    return [_number(float(v), form) for v in column]


def rough(column: pd.Series) -> list[str]:
    """Numbers to the two digits that a reader may rely on, such as ratios of seconds."""
    return ["–" if v != v else f"{float(f'{v:.2g}'):g}" for v in column]


def _number(value: float, form: str) -> str:
    if value != value:
        return "–"
    if 0 < abs(value) < NOISE:
        return f"<{NOISE:.0e}"
    return format(value + 0.0, form)


def ranged(value: str, low: str, high: str) -> str:
    """A value with the ends of its interval, if it has one."""
    return value if low == high == "–" else f"{value} [{low}, {high}]"


def is_numeric(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column.infer_objects()) and not pd.api.types.is_bool_dtype(column)


def plain(frame: pd.DataFrame, digits: int, two_digits: Sequence[str] = ()) -> str:
    """A frame as aligned text, numbers to the right; a long one is cut, and says so."""
    return aligned(frame, [rough(own) if name in two_digits else texts(own, digits) for name, own in frame.items()])


def aligned(frame: pd.DataFrame, said: Sequence[Sequence[str]]) -> str:
    columns = []
    for (name, own), told in zip(frame.items(), said, strict=True):
        cells = [str(name).replace("_", " "), *told[:LINES]]
        width, right = max(map(len, cells)), is_numeric(own)
        columns.append([c.rjust(width) if right else c.ljust(width) for c in cells])
    lines = ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
    return "\n".join(lines + [f"… and {len(frame) - LINES} more rows"] * (len(frame) > LINES))


def badge(label: str, provenance: Mapping[str, Any] | None = None) -> str:
    """Markup of a label; of a recording also its model, data set, date, commit and device, and what was MetaKE then."""
    if label not in LABELS:
        raise ParameterError(near_misses(str(label), LABELS, "label"))
    known = portable(
        {k: provenance[k] for k in (*STAMPED, "device") if (provenance or {}).get(k)}
    )
    if (provenance or {}).get("accelerator"):
        known["device"] = provenance["accelerator"]
    if "commit" in known:
        known["commit"] = str(known["commit"])[:10]
    if "dataset" in known:
        known["dataset"] = re.sub(r" sha256:\w+", "", str(known["dataset"]))  # digests stand in the provenance
    if (provenance or {}).get("metake") == LITERAL:  # made before its default was chosen
        known["metake"] = f"MetaKE {LITERAL}"
    source = f" ({escape(', '.join(map(str, known.values())))})" if label == "recorded" and known else ""
    return f'<span class="label label-{label}">{LABELS[label]}</span>{source}'


def table(
    frame: pd.DataFrame, caption: str = "", digits: int = 2, label: str | None = None,
    source: pd.DataFrame | None = None, two_digits: Sequence[str] = (), without: Sequence[str] = (),
    ranges: Mapping[str, tuple[str, str]] = MappingProxyType({})
) -> Shown:
    """A frame as an accessible table: caption, scopes, no empty header cell, aligned numbers.

    A column `label` (recomputed, recorded, reported) becomes badges; if all are equal, one in the caption.
    Without it the caption carries the label of `source`, the records that the frame was computed from (default:
    the frame itself), or the given one; "" for none.
    A named index becomes columns. digits: decimals; two_digits: columns that have no more significant ones; without:
    columns that are not shown; ranges: column → those of its lower and upper end, which are told in its own cells.
    """
    origin = (frame if source is None else source).attrs
    if label is None and "label" in frame and frame["label"].nunique() == 1:
        label, frame = frame["label"].iloc[0], frame.drop(columns="label")
    if label is None:
        label = "" if "label" in frame else origin.get("label", "recomputed")
    mark = badge(label, origin.get("provenance")) if label else ""
    frame = frame if frame.index.names == [None] else frame.reset_index()
    frame = frame.set_axis(
        [" ".join(filter(None, map(str, c))) if isinstance(c, tuple) else str(c) for c in frame.columns], axis=1
    )
    frame = in_rows(frame)
    told = {c: rough(frame[c]) if c in two_digits else texts(frame[c], digits) for c in frame}
    for c, ends in ranges.items():
        told[c] = [ranged(*cells) for cells in zip(told[c], *(told.pop(end) for end in ends), strict=True)]
    frame = frame[[c for c in frame if c in told and c not in without]]
    said = [told[c] for c in frame]
    kinds = [
        "num" if is_numeric(frame[c]) else "text long" if max(map(len, own), default=0) > LONG else "text"
        for c, own in zip(frame, said, strict=True)
    ]
    cells = [
        [badge(v) for v in frame[c]] if c == "label" else [escape(t) for t in own]
        for c, own in zip(frame, said, strict=True)
    ]
    head, rows = markup([c.replace("_", " ") for c in frame], kinds, cells)
    title = f"<caption>{escape(caption)} {mark}</caption>" if caption or mark else ""
    text = [f"{caption} [{LABELS[label]}]".strip() if label else caption, aligned(frame, said)]
    return Shown(
        f'<table class="dataframe metake-table">{title}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>',
        "\n".join(filter(None, text)),
    )


def markup(names: Sequence[str], kinds: Sequence[str], cells: Sequence[Sequence[str]]) -> tuple[str, str]:
    """Head and rows of a table, of columns; the first one names its row, unless it is a number."""
    head = "".join(
        f'<th scope="col" class="{kind}">{escape(name)}</th>' for name, kind in zip(names, kinds, strict=True)
    )
    first = "td" if kinds[0] == "num" else 'th scope="row"'
    tags, rows = [first, *["td"] * (len(kinds) - 1)], ""
    for row in zip(*cells, strict=True):
        shown = (
            f'<{tag} class="{kind}">{cell}</{tag[:2]}>' for tag, kind, cell in zip(tags, kinds, row, strict=True)
        )
        rows += f"<tr>{''.join(shown)}</tr>"
    return head, rows


def in_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with their methods in the one order of all tables and figures, within what stands left of them."""
    if "method" not in frame:
        return frame
    order = {name: i for i, (key, look) in enumerate(METHOD_STYLE.items()) for name in (key, look.name)}
    left = frame.iloc[:, : frame.columns.get_loc("method")].reset_index(drop=True)
    group = (left != left.shift()).any(axis=1).cumsum()
    places = sorted(range(len(frame)), key=lambda i: (group[i], order.get(frame["method"].iloc[i], len(order))))
    return frame.iloc[places]


@dataclass
class Verdict(Shown):
    """The outcome of a page's claim."""

    verdict: str  # "holds", "does not hold" or "inconclusive"


def verdict(
    page: str, title: str, claim: str, holds: bool | None, decided_by: str, margin: float, error: str,
    label: str = "recomputed", model: str = DEFAULT, part: str = ""
) -> Verdict:
    """The page's claim, whether it holds (None: inconclusive), what decided it, and how far that is from turning.

    margin: the distance from turning in units of its own error, and what that error is of (`experiments.decision`). A
    verdict with a margin below 1 must say that it stands within its error.

    Kept as <page>.json in the folder METAKE_VERDICTS, else in the run's own in _build/verdicts: only `make notebooks`,
    which names the committed folder, speaks for the page. Other models than the default one go into the file's name,
    and so does part: which of several claims of one page this is.
    """
    found = [
        word for key, word in VERDICTS.items() if (holds is None) == (key is None) and (key is None or holds == key)
    ]
    if len(found) != 1:
        raise ParameterError(f"the verdict of {page!r} must be True, False or None (inconclusive); found {holds!r}")
    if label not in ("recomputed", "recorded"):
        raise ParameterError(f"a verdict is recomputed or recorded; found {label!r}")
    if not margin >= 0 or (holds is not None and margin < 1 and "within" not in decided_by):
        raise ParameterError(
            f"the verdict of {page!r} is {margin:.2g} errors from turning, and does not say so; expected a margin of "
            "at least 1, or in decided_by what stands within its error"
        )
    (word, tone), name = found[0], artifact_name(f"{page}-{part}" if part else page, model)
    content = {
        "page": page, "title": title, "claim": claim, "verdict": word, "decided_by": decided_by, "label": label,
        "margin": min(float(f"{margin:.3g}"), FAR), "error": error
    }
    write_file(
        own_folder("METAKE_VERDICTS", "verdicts") / f"{name}.json",
        json.dumps(content, indent=1, ensure_ascii=False) + "\n",
    )
    html = (
        f'<div class="admonition metake-verdict metake-verdict-{tone}"><p class="admonition-title">Verdict: '
        f'<span class="verdict verdict-{tone}">{word}</span></p>'
        f"<p>{escape(claim)}</p><p>Decided by: {escape(decided_by)} {badge(label)}</p>"
        f"<p>Distance from turning: {distance(margin, error)}.</p></div>"
    )
    return Verdict(html, f"Verdict: {word} – {claim}\nDecided by: {decided_by} [{LABELS[label]}]", word)


def distance(margin: float, error: str) -> str:
    """How far a verdict is from turning, in words."""
    size = "more than a million" if margin > 1e6 else f"{margin:.3g}"
    return f"{size} times its error ({error})" if margin > 1 else f"within its error ({error})"


def provenance(source: pd.DataFrame | Mapping[str, Any]) -> Shown:
    """Where records come from. The text has only what is equal on every machine; the markup has everything."""
    if isinstance(source, pd.DataFrame):
        if "provenance" not in source.attrs:
            raise ProvenanceError(
                "these records carry no provenance; expected it in .attrs['provenance'], as recorded(...) sets it"
            )
        source = source.attrs["provenance"]
    given = portable(source)
    short = {
        k: str(v).removeprefix("sha256:")[:12] if k.endswith("digest") else _flat(v)
        for k, v in given.items()
        if v not in (None, "")
    }
    stable = [f"{_named(k, given.get(k))}: {short[k]}" for k in STABLE if k in short]
    items = "".join(
        f"<dt>{escape(_named(str(k), v))}</dt><dd>{escape(_flat(v))}</dd>"
        for k, v in given.items()
        if v not in (None, "")
    )
    text = f"Provenance: {', '.join(stable)}"
    return Shown(
        f'<details class="metake-provenance"><summary>{escape(text)}</summary><dl>{items}</dl></details>', text
    )


def _named(key: str, value: Any) -> str:
    """A key in words; one of several that could be is named as one."""
    return key.replace("_", " ").removesuffix("s" if key == "seeds" and len(_listed(value)) == 1 else "")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_flat(v)}" for k, v in value.items())
    return ", ".join(map(_flat, value)) if isinstance(value, list | tuple) else str(value)
