"""Parts of a long experiment that are finished stay finished: their records, in one small file each."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metake.support.storage import read_json, write_file

log = logging.getLogger("metake")


def kept(folder: str | Path | None, told: Any, make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What `make` returns, records of plain data; read back if an earlier call kept them in `folder` (None: no).

    told: everything that the records depend on; its repr names the file, so that another model, seed or setting gets
    another.
    """
    if folder is None:
        return make()
    file = Path(folder) / f"{hashlib.sha256(repr(told).encode()).hexdigest()[:16]}.json"
    try:
        return read_json(file, list)
    except FileNotFoundError:
        pass
    except ValueError as error:
        log.warning("%s is damaged (%s), and made again", file, error)
    write_file(file, json.dumps(make(), ensure_ascii=False))
    return read_json(file, list)
