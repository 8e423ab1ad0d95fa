"""metake: knowledge editing in one formula, and the reproducibility companion of MetaKE (arXiv 2603.12677).

An edit is Δ = R·M: targets decide the residuals R, a metric decides the gate M.

The names stand in `__init__.pyi`; each is imported when it is first used, so that what needs no model does not wait
for one.
"""

from typing import Any

import lazy_loader

from metake.support.errors import near_misses
from metake.support.version import VERSION as __version__

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """Raises AttributeError, with near matches, for a name that does not exist."""
    if name not in __all__:
        raise AttributeError(near_misses(name, __all__, "name in metake"))
    return _load(name)
