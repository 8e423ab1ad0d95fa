"""What the methods are called and say of themselves, read in the source of `methods.py`.

Importing it would load torch and transformers, seconds that neither a list nor a mistyped name needs.
A test holds what is read here against what is imported.
"""

from __future__ import annotations

import ast
import tomllib
from functools import cache
from pathlib import Path

from metake.data.files import packaged


@cache
def _statements() -> list[ast.stmt]:
    return ast.parse((Path(__file__).parents[1] / "methods.py").read_text(encoding="utf-8")).body


def _table(name: str) -> ast.expr:
    """The expression that fills one of its tables."""
    return next(s.value for s in _statements() if isinstance(s, ast.AnnAssign) and ast.unparse(s.target) == name)


def methods(name: str = "METHODS") -> dict[str, str]:
    """Every method of a table with its docstring in one line: equation and source."""
    told = {s.name: ast.get_docstring(s) for s in _statements() if isinstance(s, ast.FunctionDef)}
    table = _table(name)
    return {
        name.value: " ".join(told[made.id].split()) for name, made in zip(table.keys, table.values, strict=True)
    }


def operators() -> dict[str, tuple[str, str]]:
    """MetaKE on the gates of other methods, a table with a key for each: name → the reading of MetaKE, its base."""
    return {name.value: tuple(name.value.rsplit("/", 1)) for name in _table("OPERATORS").keys}


def differences() -> dict[str, tuple[str, str]]:
    """Where a paper and released code disagree: name → what it does, what the default does."""
    told = tomllib.loads(packaged("differences.toml"))
    return {n: (d["code"], d["paper"]) if d["default"] == "paper" else (d["paper"], d["code"]) for n, d in told.items()}


def names() -> list[str]:
    """Every name that `--method` takes."""
    return [*methods(), *methods("GRADIENT"), *methods("FINE_TUNING"), *operators(), *differences()]
