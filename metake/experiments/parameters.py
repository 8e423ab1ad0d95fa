"""A page refuses parameters that it does not have: papermill itself only warns about them and runs the defaults."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection, MutableMapping, Sequence
from dataclasses import MISSING, fields
from types import ModuleType
from typing import Any

from metake.support.errors import ParameterError, near_misses

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list"}
_KERNEL = {"In", "Out", "exit", "quit", "open", "get_ipython"}


def accept(
    namespace: MutableMapping[str, Any], **expected: type | tuple[type, float, float] | Sequence[str]
) -> dict[str, Any]:
    """Check a page's parameters, right after the cell that sets them, and return them: `accept(globals(), model=str,
    requests=(int, 2, 800))`.

    expected: name → a type (list: of whole numbers, such as seeds), (type, least, most), or the allowed words.
    Raises ParameterError, with near matches for a name that is no parameter of the page, and with the accepted range
    for a value outside it.
    `n_edits`, the same on every page, is taken for the page's own word, which is set in `namespace`.
    From here on this run's figures and verdict have a folder of their own, if nobody names one:
    see `report.figures_dir`.
    """
    if "n_edits" in namespace and "n_edits" not in expected:
        namespace[own_word("n_edits", expected)] = namespace.pop("n_edits")
    given = {
        k: v
        for k, v in namespace.items()
        if not k.startswith("_") and k not in _KERNEL and not isinstance(v, ModuleType) and not callable(v)
    }
    for name in given:
        own_word(name, expected)
    for name, rule in expected.items():
        if name not in given:
            raise ParameterError(f"parameter {name!r} is not set")
        _check(name, given[name], rule)
    logging.getLogger("metake.editing").setLevel(logging.ERROR)  # a page's tables say what a warning would
    os.environ["METAKE_RUN"] = hashlib.sha256(repr(sorted(given.items())).encode()).hexdigest()[:8]
    return given


def require_kinds(config: Any, **optional: tuple[type, ...]) -> None:
    """Raises ParameterError for a field of a dataclass whose value is of another type than its default; optional: the
    types of fields whose default is None. Lists hold whole numbers.
    """
    for field in fields(config):
        value, usual = getattr(config, field.name), field.default
        usual = field.default_factory() if usual is MISSING else usual
        kinds = (*optional[field.name], type(None)) if field.name in optional else (type(usual),)
        listed = not isinstance(value, list | tuple) or all(type(item) is int for item in value)
        if not isinstance(value, kinds) or not listed:
            raise ParameterError(f"{field.name} is {value!r:.40}; expected {' or '.join(k.__name__ for k in kinds)}")


def own_word(name: str, known: Collection[str]) -> str:
    """A parameter's name on a page that has those `known`. Raises ParameterError, with near matches, for another."""
    for own in ("edits", "requests", "pool") if name == "n_edits" else ():
        if own in known:
            return own
    if name not in known:
        raise ParameterError(near_misses(name, known, "parameter of this page"))
    return name


def _check(name: str, value: Any, rule: type | tuple[type, float, float] | Sequence[str]) -> None:
    if isinstance(rule, type):
        if not isinstance(value, rule) or isinstance(value, bool) != (rule is bool):
            hint = f" (for papermill: -y '{name}: [0, 1]')" if rule is list else ""
            raise ParameterError(f"{name} must be {KINDS[rule]}; found {value!r}{hint}")
        if rule is list and not (value and all(type(one) is int for one in value)):
            raise ParameterError(f"{name} must be one or more whole numbers; found {value!r}")
    elif isinstance(rule[0], type):
        kind, least, most = rule
        if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
            raise ParameterError(f"{name} must be {KINDS[kind]} from {least} to {most}; found {value!r}")
    else:
        if isinstance(value, list | tuple) and not value:
            raise ParameterError(f"{name} must name at least one of: {', '.join(rule)}")
        for word in value if isinstance(value, list | tuple) else [value]:
            if word not in rule:
                raise ParameterError(near_misses(str(word), rule, name))
