"""A page refuses parameters that it does not have: papermill itself only warns about them and runs the defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from metake.errors import ParameterError, near_misses

_KERNEL = {"In", "Out", "exit", "quit", "open", "get_ipython"}


def accept(namespace: Mapping[str, Any], **expected: type | tuple[type, float, float] | Sequence[str]) -> dict[str, Any]:
    """Check a page's parameters, right after the cell that sets them, and return them: `accept(globals(), model=str, requests=(int, 2, 800))`.

    expected: name → a type, (type, least, most), or the allowed words. Raises ParameterError, with near matches for a
    name that is no parameter of the page, and with the accepted range for a value outside it.
    """
    given = {k: v for k, v in namespace.items() if not k.startswith("_") and k not in _KERNEL and not isinstance(v, ModuleType) and not callable(v)}
    for name in given:
        if name not in expected:
            raise ParameterError(near_misses(name, expected, "parameter of this page"))
    for name, rule in expected.items():
        if name not in given:
            raise ParameterError(f"parameter {name!r} is not set")
        _check(name, given[name], rule)
    return given


def _check(name: str, value: Any, rule: type | tuple[type, float, float] | Sequence[str]) -> None:
    if isinstance(rule, type):
        if not isinstance(value, rule) or isinstance(value, bool) != (rule is bool):
            raise ParameterError(f"{name} must be a {rule.__name__}; found {value!r}")
    elif isinstance(rule[0], type):
        kind, least, most = rule
        if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
            raise ParameterError(f"{name} must be a {kind.__name__} from {least} to {most}; found {value!r}")
    else:
        for word in value if isinstance(value, list | tuple) else [value]:
            if word not in rule:
                raise ParameterError(near_misses(str(word), rule, name))
