"""Progress bars: on a terminal, never in a pipe or a notebook."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm
from transformers.utils import logging as transformers_logging

T = TypeVar("T")


def progress(items: Iterable[T], what: str) -> Iterator[T]:
    """Iterate with a bar on standard error if that is a terminal."""
    hidden = not sys.stderr.isatty()
    return iter(tqdm(items, desc=what, leave=False, disable=hidden, file=sys.stderr, dynamic_ncols=True))


@contextlib.contextmanager
def no_bars_in_pipes() -> Iterator[None]:
    """Switch transformers' own bars off inside the block unless standard error is a terminal."""
    enabled = transformers_logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
