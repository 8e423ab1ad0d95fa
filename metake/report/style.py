"""One visual language: how a method looks and is called, in every figure and table."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import NamedTuple


class Style(NamedTuple):
    """How one method looks. Color is never the only sign: marker and line differ too."""

    color: str
    marker: str | tuple[int, int, int]  # as matplotlib names them: (points, 1, angle) is a star
    line: str
    name: str


# contrast ≥ 3 on white and on #121212; apart in all three color-vision deficiencies; stars are kin of MetaKE
METHOD_STYLE: dict[str, Style] = {
    "pre-edit": Style("#64666c", "X", ":", "pre-edit"),
    "rome": Style("#93827d", "p", "--", "ROME"),
    "memit": Style("#00a76b", "s", "-", "MEMIT"),
    "memit_seq": Style("#519449", "D", "--", "MEMIT-seq"),
    "emmet": Style("#018191", ">", "-.", "EMMET"),
    "pmet": Style("#4b6d21", "h", "-.", "PMET"),
    "prune": Style("#915c57", "v", "--", "PRUNE"),
    "rect": Style("#75613b", "<", "-.", "RECT"),
    "alphaedit": Style("#d97808", "^", "-", "AlphaEdit"),
    "blue": Style("#3664be", "P", "--", "AlphaEdit-BLUE"),
    "sphere": Style("#9933ff", "d", "-.", "SPHERE"),
    "metake_v1": Style("#cd5ab9", "*", "--", "MetaKE v1"),
    "metake": Style("#c70a2c", "o", "-", "MetaKE"),
    "metake/whole": Style("#cb3c99", (5, 1, 0), "-", "MetaKE, whole look-ahead"),
    "ft": Style("#3090f0", (3, 0, 45), ":", "FT"),
    "ft_l": Style("#9c60fc", (4, 0, 0), "--", "FT-L"),
    "in_prompt": Style("#973e9f", (7, 1, 0), ":", "In the prompt"),
    "in_prompt/beside": Style("#748564", (9, 1, 0), ":", "In the prompt, of two"),
    "ultraedit": Style("#9a07e2", (5, 0, 36), "--", "UltraEdit"),
    "mend": Style("#5587d2", (3, 0, 15), ":", "MEND"),
    "malmen": Style("#c9117c", "H", "-.", "MALMEN"),
    "smedit": Style("#3c6984", (4, 0, 20), "-", "SMEdit"),
    "metake/memit": Style("#f94a5f", (4, 1, 0), "--", "MetaKE on MEMIT"),
    "metake/blue": Style("#c06bf5", (6, 1, 0), "-.", "MetaKE on BLUE"),
    "metake/sphere": Style("#b809b9", (8, 1, 0), ":", "MetaKE on SPHERE"),
    "metake/whole/memit": Style("#a858ae", (4, 1, 20), "--", "MetaKE, whole, on MEMIT"),
    "metake/whole/sphere": Style("#e558dd", (8, 1, 10), ":", "MetaKE, whole, on SPHERE"),
    "metake/literal/memit": Style("#6d959f", (4, 1, 70), "--", "MetaKE (literal) on MEMIT"),
    "metake/literal/blue": Style("#b68884", (6, 1, 15), "-.", "MetaKE (literal) on BLUE"),
    "metake/literal/sphere": Style("#7c4fb1", (8, 1, 30), ":", "MetaKE (literal) on SPHERE"),
    "metake/literal": Style("#c67aa5", (3, 1, 270), ":", "MetaKE (literal)"),
    "pmet/unweighted": Style("#7c9c2b", "8", ":", "PMET (plain KL)"),
    "prune/added-twice": Style("#d90111", (3, 1, 180), ":", "PRUNE (added twice)"),
    "rect/original": Style("#807643", (3, 1, 90), ":", "RECT (original)"),
    "alphaedit/paper": Style("#ba6b02", (3, 1, 0), ":", "AlphaEdit (as in its paper)"),
    "sphere/stored": Style("#7969da", (4, 1, 45), ":", "SPHERE (stored side)"),
    "mend/added": Style("#3f76c9", (3, 1, 30), ":", "MEND (added)"),
    "malmen/living": Style("#d8358c", (6, 1, 30), ":", "MALMEN (living moments)"),
    "malmen/micro-batch": Style("#e617d1", (8, 1, 20), ":", "MALMEN (micro-batches)"),
}
FALLBACK = (("#0e7fa8", "#a06a00", "#7a5cc8", "#b0487a"), ("H", (5, 1, 36), (7, 0, 0)), ("-", "--", "-.", ":"))


def style(method: str) -> Style:
    """The look of a method; one that METHOD_STYLE does not know gets a look derived from its name, always the same."""
    seed = zlib.crc32(method.encode())
    colors, markers, lines = FALLBACK
    return METHOD_STYLE.get(method) or Style(colors[seed % 4], markers[seed // 4 % 3], lines[seed // 12 % 4], method)


def in_order(methods: Iterable[str]) -> list[str]:
    """Methods in the one order of all figures, unknown ones last."""
    known = list(METHOD_STYLE)
    return sorted(dict.fromkeys(methods), key=lambda m: (known.index(m) if m in known else len(known), m))
