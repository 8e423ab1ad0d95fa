"""Progress bars: on a terminal, never in a pipe or a notebook."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], what: str) -> Iterator[T]:
    """Iterate with a bar on standard error if that is a terminal."""
    return iter(tqdm(items, desc=what, leave=False, disable=not sys.stderr.isatty(), file=sys.stderr, dynamic_ncols=True))
