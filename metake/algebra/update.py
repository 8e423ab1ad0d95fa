"""What an edit is once it exists: thin factors per layer and a record of where they came from.

Δ = left @ right, always (d_out, d_in) whatever the module stores, so that `left` and `right` are LoRA's B and A.
A model is anything with `weight(module)`, `add(module, delta)`, `scratch(modules)` and `digest(module)`,
as `LanguageModel`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metake.algebra import base
from metake.support.errors import ParameterError, ProvenanceError
from metake.support.machine import usable
from metake.support.models import findable
from metake.support.storage import load_tensors, parse_json, reading, save_tensors, whole_folder


@dataclass(frozen=True)
class LayerUpdate:
    """Update of one weight, Δ = left @ right (+ dense).

    left: (d_out, r), R;  right: (r, d_in), M;  dense: (d_out, d_in) or None, for methods whose update is not thin.
    """

    module: str
    left: Tensor
    right: Tensor
    dense: Tensor | None = None

    @property
    def delta(self) -> Tensor:
        """Δ, (d_out, d_in)."""
        thin = self.left.contiguous() @ self.right.contiguous()  # its last digit depends on the layout
        return thin if self.dense is None else thin + self.dense

    @property
    def norm(self) -> float:
        """‖Δ‖_F; of a thin update √tr(RᵀR MMᵀ) by the Gram matrices of its factors: Δ itself is not formed."""
        (d_out, rank), d_in = self.left.shape, self.right.shape[1]
        if self.dense is not None or rank * (d_out + d_in) > d_out * d_in:
            return self.delta.norm().item()
        return ((self.left.T @ self.left) * (self.right @ self.right.T)).sum().clamp_min(0).sqrt().item()

    @property
    def rank(self) -> int:
        """Upper bound of the rank of the thin part: its inner dimension."""
        return self.left.shape[1]

    def to(self, device: Any) -> LayerUpdate:
        """This update on a device."""
        dense = None if self.dense is None else self.dense.to(device)
        return LayerUpdate(self.module, self.left.to(device), self.right.to(device), dense)

    def __add__(self, other: LayerUpdate) -> LayerUpdate:
        """Sum of two updates of one weight: factors side by side, on the accelerator if one of them is there."""
        if self.module != other.module:
            raise ParameterError(f"updates of different weights do not add: {self.module} and {other.module}")
        parts = _together([d for d in (self.dense, other.dense) if d is not None])
        dense = sum(parts[1:], parts[0]) if parts else None
        return _side_by_side(self.module, [self.left, other.left], [self.right, other.right], dense)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Singular value decomposition of Δ; a thin update's by the QR of its factors alone, O((d_out + d_in) r²)."""
        if self.dense is not None:
            return torch.linalg.svd(self.delta, full_matrices=False)
        q_left, r_left = torch.linalg.qr(self.left)
        q_right, r_right = torch.linalg.qr(self.right.T)
        u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        return q_left @ u, s, vh @ q_right.T

    def compress(self, rank: int) -> tuple[LayerUpdate, float]:
        """Best approximation of Δ of this rank (Eckart–Young), and the share of ‖Δ‖_F² that it discards; one `svd`."""
        if rank < 1:
            raise ParameterError(f"rank must be ≥ 1; found {rank}")
        u, s, vh = self.svd()
        energy = s.square().sum()
        lost = (s[rank:].square().sum() / energy).item() if energy > 0 else 0.0
        root = s[:rank].sqrt()
        return LayerUpdate(self.module, u[:, :rank] * root, root[:, None] * vh[:rank]), lost


def _together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors on one device: where the first stands that is not on the CPU."""
    place = next((t.device for t in tensors if t.device.type != "cpu"), None)
    return [t if place is None else t.to(place) for t in tensors]


def _side_by_side(module: str, lefts: Sequence[Tensor], rights: Sequence[Tensor], dense: Tensor | None) -> LayerUpdate:
    return LayerUpdate(module, torch.cat(_together(lefts), 1), torch.cat(_together(rights)), dense)


@dataclass(frozen=True)
class EditRecord:
    """Where an edit came from: enough to repeat it and to refuse a base that it was not made for."""

    recipe: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)  # id, origin, revision, dtype, device
    # and of one that carries edits of the same run: sketches (module → `base.sketch`), tolerance (of a weight's norm)
    weights: dict[str, str] = field(default_factory=dict)  # module → SHA-256 of the tensor before the edit
    requests: tuple[str, ...] = ()
    requests_digest: str = ""
    statistics_digest: str = ""
    context_templates: tuple[str, ...] = ()
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)  # planned, realized, ‖Δ‖/‖W‖, spectrum of B
    trace: dict[str, Any] = field(default_factory=dict)  # losses per step and request
    # of MetaKE's outer level: requests, for how many its loss fell, and the mean loss before and after
    refinement: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0  # bytes

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> EditRecord:
        raw = parse_json(text)
        if unknown := raw.keys() - {f.name for f in fields(cls)}:
            found = f"edit record has unknown fields {sorted(unknown)}"
            raise ProvenanceError(f"{found}; it was written by another version of metake")
        found, plain = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}), vars(cls())
        texts = (*dict(found.weights).values(), *found.requests, *found.context_templates, found.base.get("id", ""))
        sketches = found.base.get("sketches", {}).values()
        numbers = [found.base.get("tolerance", 0.0), *(x for sketch in sketches for x in sketch)]
        numbers += [*found.recipe.get("discarded", {}).values(), *found.seconds.values()]
        wrong = [name for name, value in vars(found).items() if not isinstance(value, type(plain[name]))]
        wrong += [f"{t!r:.40}" for t in texts if not isinstance(t, str)]
        wrong += [f"{n!r:.40}" for n in numbers if not isinstance(n, (int, float))]
        if wrong or any(len(sketch) != base.PROBES for sketch in sketches):
            raise ValueError(f"not what it should be: {', '.join(wrong) or 'the sketch of a weight'}")
        return found

    @classmethod
    def load(cls, folder: str | os.PathLike) -> EditRecord:
        """The record of an edit that `Edit.save` wrote. Raises ProvenanceError if it is missing or damaged."""
        with reading(folder, "no saved edit", "make it again"):
            return cls.from_json((Path(folder) / "record.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Edit:
    """Updates of one or more weights, with their record. A value: applying it changes the model, never the edit."""

    updates: tuple[LayerUpdate, ...]
    record: EditRecord = EditRecord()

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(u.module for u in self.updates)

    def apply(self, model: Any, check: bool = True) -> None:
        """Add the update to the model's weights, for good; Δ is formed where the weight is, wherever the factors are.

        Raises ProvenanceError on another base than the recorded one.
        """
        if check:
            self.check_base(model)
        with model.restored_on_error(self.modules):
            for update in self.updates:
                model.add(update.module, update.to(model.weight(update.module).device))

    @contextlib.contextmanager
    def applied(self, model: Any, check: bool = True) -> Iterator[Any]:
        """Apply within the block; on exit the original tensors are copied back, bit for bit."""
        with model.scratch(self.modules):
            self.apply(model, check)
            yield model

    def check_base(self, model: Any) -> None:
        """Raise ProvenanceError unless every weight to be edited is the recorded one: to the bit, or, where the base
        carries edits of the same run already, within the tolerance that the record states.
        """
        base.check(model, self.record.weights, self.record.base)

    def __add__(self, other: Edit) -> Edit:
        """One edit that does what `self` then `other` do: `total` of the two."""
        return total((self, other))

    def compress(self, rank: int) -> tuple[Edit, dict[str, float]]:
        """Every update at most of the given rank, and the discarded share of its energy per module.

        The record's recipe keeps, under "discarded", what all compressions so far have dropped.
        """
        pairs = {u.module: u.compress(rank) for u in self.updates}
        lost, before = {m: p[1] for m, p in pairs.items()}, self.record.recipe.get("discarded", {})
        discarded = {m: 1 - (1 - share) * (1 - before.get(m, 0.0)) for m, share in lost.items()}
        record = replace(self.record, recipe=self.record.recipe | {"discarded": discarded})
        return Edit(tuple(p[0] for p in pairs.values()), record), lost

    def save(self, folder: str | os.PathLike) -> Path:
        """Write factors (safetensors) and record (JSON) to `folder`, which appears whole or not at all."""
        parts = [(f"{u.module}:{part}", getattr(u, part)) for u in self.updates for part in ("left", "right", "dense")]
        tensors = {name: tensor for name, tensor in parts if tensor is not None}
        with whole_folder(folder, "record.json") as scratch:
            save_tensors(tensors, scratch / "edit.safetensors")
            (scratch / "record.json").write_text(self.record.to_json(), encoding="utf-8")
        return Path(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike, device: Any = "cpu") -> Edit:
        """Read an edit that `save` wrote. device: of its tensors.

        Raises ProvenanceError if the folder is not one, or damaged; ParameterError for an unknown device.
        """
        folder, place = Path(folder), usable(device)
        if not (folder / "record.json").is_file() or not (folder / "edit.safetensors").is_file():
            raise ProvenanceError(f"{folder} holds no saved edit (expected edit.safetensors and record.json)")
        parts: dict[str, dict[str, Tensor]] = {}
        record = EditRecord.load(folder)
        with reading(folder, "no saved edit", "make it again"):
            for name, tensor in load_tensors(folder / "edit.safetensors")[0].items():
                module, part = name.rsplit(":", 1)
                parts.setdefault(module, {})[part] = tensor.to(place)
            updates = tuple(LayerUpdate(m, **parts[m]) for m in {**record.weights, **parts})
            for u in updates:
                kinds = {(t.dtype, t.ndim) for t in parts[u.module].values()}
                if u.to("meta").delta.ndim != 2 or len(kinds) > 1 or not u.left.is_floating_point():
                    raise ValueError(f"the factors of {u.module} are no matrices of numbers")
        return cls(updates, record)

    def to_peft(self, folder: str | os.PathLike, rank: int | None = None) -> dict[str, float]:
        """Write a LoRA adapter that `PeftModel.from_pretrained(model, folder)` loads: B = left, A = right, scaling 1.

        rank: compress to it; needed for dense updates. Returns the discarded share of ‖Δ‖² per module (0 if exact).
        """
        edit, lost = self, dict.fromkeys(self.modules, 0.0)
        if rank is not None:
            edit, lost = self.compress(rank)
        if dense := [u.module for u in edit.updates if u.dense is not None]:
            what = f"the updates of {', '.join(dense)} are dense, an adapter is thin"
            raise ParameterError(f"{what}: pass rank=…, the discarded energy is returned")
        size = max((u.rank for u in edit.updates), default=0)
        if not size:
            raise ParameterError("an edit of zero requests has no adapter to export")
        tensors = {}
        for u in edit.updates:  # peft wants one rank for all modules: pad with zeros, which changes nothing
            pad = size - u.rank
            tensors[f"base_model.model.{u.module}.lora_A.weight"] = torch.nn.functional.pad(u.right, (0, 0, 0, pad))
            tensors[f"base_model.model.{u.module}.lora_B.weight"] = torch.nn.functional.pad(u.left, (0, pad))
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM",
            "base_model_name_or_path": findable(self.record.base["id"]) if "id" in self.record.base else None,
            "r": size, "lora_alpha": size, "target_modules": list(edit.modules),
            "fan_in_fan_out": bool(self.record.base.get("conv1d", False)), "bias": "none", "inference_mode": True,
        }  # fmt: skip
        provenance = json.dumps({"discarded_energy": lost, "record": asdict(edit.record)}, indent=1, ensure_ascii=False)
        with whole_folder(folder, "metake.json") as scratch:
            save_tensors(tensors, scratch / "adapter_model.safetensors")
            (scratch / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
            (scratch / "metake.json").write_text(provenance, encoding="utf-8")
        return lost


def total(edits: Sequence[Edit]) -> Edit:
    """One edit that does what a sequence of edits does, in order: every module's factors side by side, joined once.

    The record keeps every weight's first base and all requests, their digests joined by +. The edits are gone through
    once and their dense parts summed on the way, so that a sequence that reads them from disk need not hold them all.
    """
    if not edits:
        raise ParameterError("no edits to add up")
    if len(edits) == 1:
        return edits[0]
    thin: dict[str, list[tuple[Tensor, Tensor]]] = {}
    dense: dict[str, Tensor] = {}
    records = []
    for edit in edits:
        records.append(edit.record)
        for u in edit.updates:
            thin.setdefault(u.module, []).append((u.left, u.right))
            if u.dense is not None:
                dense[u.module] = sum(_together([dense[u.module], u.dense])) if u.module in dense else u.dense
    updates = tuple(
        _side_by_side(module, *zip(*factors, strict=True), dense.get(module)) for module, factors in thin.items()
    )
    return Edit(updates, _joined(records))


def _joined(records: Sequence[EditRecord]) -> EditRecord:
    weights, sketches, discarded, seconds = {}, {}, {}, Counter()
    for record in records:
        sketches |= {m: own for m, own in record.base.get("sketches", {}).items() if m not in weights}
        weights = {**record.weights, **weights}
        discarded |= {m: max(s, discarded.get(m, 0.0)) for m, s in record.recipe.get("discarded", {}).items()}
        seconds.update(record.seconds)
    return replace(
        records[0], weights=weights, layers={}, trace={}, seconds=dict(seconds),
        base=records[0].base | ({"sketches": sketches, "tolerance": base.TOLERANCE} if sketches else {}),
        recipe=records[0].recipe | ({"discarded": discarded} if discarded else {}),
        requests=tuple(request for record in records for request in record.requests),
        requests_digest="+".join(record.requests_digest for record in records if record.requests_digest),
        peak_memory=max(record.peak_memory for record in records),
    )
