"""Every error a user can cause, under one root. A message says what was found, what was expected, and the next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MetakeError(Exception):
    """Root of the library's errors: catch this to catch them all."""


class RequestError(MetakeError, ValueError):
    """An edit request, or a file of them, cannot be used as given."""


class ArchitectureError(MetakeError, ValueError):
    """The model does not match a row of the architecture table."""


class StatisticsError(MetakeError, ValueError):
    """Key statistics are singular, too few, of another model, or leave no room to edit."""


class ProvenanceError(MetakeError, ValueError):
    """A file or a model is not the one that a record names."""


class NumericalError(MetakeError, ArithmeticError):
    """A loss or a solve left the finite numbers."""


class ParameterError(MetakeError, ValueError):
    """A name is unknown or a value is out of its range."""


def near_misses(found: str, known: Iterable[str], what: str) -> str:
    """The sentence that answers an unknown name: what was found, the nearest known names, all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(found, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"unknown {what} {found!r}.{hint} Known: {', '.join(names)}."
