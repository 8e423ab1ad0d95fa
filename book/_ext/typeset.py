"""A claim is kept as plain text, equal wherever it is printed; on a page its formulas are set.

A word belongs to a formula if it has a sign that prose has not, is a single letter, or stands beside a relation.
"""

import re

from docutils import nodes

RELATION = re.compile(r"[=<>≤≥≠→+−]")
SIGN = re.compile("[α-ωΓΔΛΣ∇‖⟨⟩√·ᵀ²⁻¹ᵢ_ĝ]|\\w\u0302")
LETTER = re.compile(r"−?[b-zB-HJ-Z]")
END = re.compile(r"^(.*?)([.,;:]*)$")
HYPHEN = re.compile(r"^([a-z]+-)(.+)$")  # high-γ
TEX = {
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "ε": r"\varepsilon ", "η": r"\eta ",
    "κ": r"\kappa ", "λ": r"\lambda ", "τ": r"\tau ", "Γ": r"\Gamma ", "Δ": r"\Delta ", "Σ": r"\textstyle\sum ",
    "∇": r"\nabla ", "‖": r"\Vert ", "⟨": r"\langle ", "⟩": r"\rangle ", "·": r"\cdot ", "ᵀ": r"^\top ", "⁻¹": "^{-1}",
    "²": "^2", "ᵢ": "_i", "ĝ": r"\hat g ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "→": r"\to ", "−": "-",
    "inf": r"\inf ",
}
SPOKEN = re.compile("|".join(sorted(map(re.escape, TEX), key=len, reverse=True)))
SUBSCRIPT = re.compile(r"_([A-Za-z]\w*)")
ROOT = re.compile(r"√(\w+)")
HAT = re.compile("(\\w)\u0302")


def tex(formula: str) -> str:
    """A formula of plain text as TeX."""
    formula = formula.replace("λmax", "λ_max")
    formula = ROOT.sub(r"\\sqrt{\1}", formula)
    formula = SUBSCRIPT.sub(lambda s: "_{" + (s[1] if len(s[1]) < 3 else rf"\text{{{s[1]}}}") + "}", formula)
    formula = HAT.sub(r"\\hat{\1}", formula)
    return " ".join(SPOKEN.sub(lambda found: TEX[found[0]], formula).split())


def pieces(text: str) -> list[tuple[str, bool]]:
    """A claim in parts, each with whether it is a formula."""
    words = [END.match(word).groups() for word in text.split()]
    kinds = [bool(SIGN.search(word) or LETTER.fullmatch(word) or RELATION.fullmatch(word)) for word, _ in words]
    for i, (word, end) in enumerate(words):
        if RELATION.fullmatch(word):
            kinds[i - 1] = kinds[i - 1] or not words[i - 1][1]
            kinds[i + 1] = True
    found: list[tuple[str, bool]] = []
    for (word, end), formula in zip(words, kinds, strict=True):
        before, rest = HYPHEN.match(word).groups() if formula and HYPHEN.match(word) else ("", word)
        joined = formula and found and found[-1][1]
        if found and not joined:
            found.append((" ", False))
        if before:
            found.append((before, False))
        if joined:
            found[-1] = (f"{found[-1][0]} {rest}", True)
        else:
            found.append((rest, formula))
        if end:
            found.append((end, False))
    return found


def typeset(text: str) -> list[nodes.Node]:
    return [nodes.math("", tex(part)) if formula else nodes.Text(part) for part, formula in pieces(text)]
