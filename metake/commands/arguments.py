"""Words of a command line: near matches for misspelled ones, accepted ranges for numbers.
Every mistake is a ParameterError.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from metake.support.errors import ParameterError, near_misses


class Parser(argparse.ArgumentParser):
    """argparse with near matches for misspelled commands and options, and one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise ParameterError(f"{message}. See: {self.prog} --help")

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Unknown options are answered first: a misspelled one must not be reported as a missing one."""
        args = sys.argv[1:] if args is None else list(args)
        known = [option for action in self._actions for option in action.option_strings]
        for word in args:
            if word == "--" or (self._subparsers and not word.startswith("-")):
                break
            if re.match(r"--?[A-Za-z]", word) and " " not in word and (name := word.split("=")[0]) not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = (
                    f" Did you mean {near[0]}?"
                    if near
                    else f" Known: {', '.join(sorted(o for o in known if o.startswith('--')))}."
                )
                raise ParameterError(f"{self.prog} has no option {name!r}.{hint}")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            raise ParameterError(near_misses(str(value), map(str, action.choices), action.dest))


def number(kind: Callable, least: float, open_end: bool = False) -> Callable:
    """A parser of numbers, `kind` int or float, at least (open_end: above) `least`; its errors name the accepted
    range.
    """

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and (value > least if open_end else value >= least)):
            whole = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {whole} {'>' if open_end else '≥'} {least:g}, found {text!r}")
        return value

    return parse


def assignment(text: str) -> tuple[str, str]:
    """A parser of name=value."""
    name, equals, value = text.partition("=")
    if not (equals and name.strip() and value.strip()):
        raise argparse.ArgumentTypeError(f"expected name=value, found {text!r}")
    return name.strip(), value.strip()
