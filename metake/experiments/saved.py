"""The edits of a run as they lie on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from metake.algebra.update import Edit, EditRecord
from metake.support.storage import atomic_path, save_tensors


def save_batch(folder: Path, edit: Edit, keys: Mapping[int, Tensor]) -> None:
    """One batch's edit, and the keys that the next ones must remember, whole or not at all."""
    with atomic_path(folder) as temporary:
        edit.save(temporary)
        save_tensors({str(i): k for i, k in keys.items()}, temporary / "keys.safetensors")


@dataclass(frozen=True)
class SavedEdits(Sequence[Edit]):
    """A run's edits in order, as they lie on disk: each is read (and checked) when it is asked for, none is kept."""

    folders: tuple[Path, ...]
    device: Any = "cpu"  # of their tensors

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, place: int) -> Edit:
        return Edit.load(self.folders[place], self.device)

    def __iter__(self) -> Iterator[Edit]:
        return map(self.__getitem__, range(len(self)))  # a generator would hold on to the one before

    def records(self) -> Iterator[EditRecord]:
        """Their records alone, without a look at the tensors."""
        return map(EditRecord.load, self.folders)
