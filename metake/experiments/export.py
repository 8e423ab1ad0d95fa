"""A run's edits as other programs take them: one edit, a LoRA adapter, or the whole edited model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from metake.algebra.update import total
from metake.experiments.runs import open_run
from metake.language.model import load
from metake.support.progress import no_bars_in_pipes
from metake.support.storage import read_json, reading, whole_folder

SERVED = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as max_lora_rank


def export(
    folder: str | Path, out: str | Path, format: str = "peft", rank: int | None = None, device: str | None = None
) -> dict[str, float]:
    """Write all edits of a run to the folder `out`, whole or not at all; gives the discarded share of ‖Δ‖² per module.

    format: "edit" (`Edit.load`), "peft" (a LoRA adapter), or "model", the run's model with its edits applied in their
    order, as transformers loads it, with its tokenizer; rank: compress their sum to it. device: of the model's weights
    while they are edited.
    """
    config, edits = open_run(folder)
    if format == "peft":
        return total(edits).to_peft(out, rank)
    kept, lost = total(edits).compress(rank) if rank else (None, {})
    if format == "edit":
        (kept or total(edits)).save(out)
        return lost
    # a folder of somebody else is refused before a model is loaded
    with whole_folder(out, "metake.json") as scratch, no_bars_in_pipes():
        lm = load(config.model, config.dtype, device)
        for edit in [kept] if kept else edits:
            edit.apply(lm)
        lm.model.save_pretrained(scratch)
        lm.tokenizer.save_pretrained(scratch)
        told = {
            "config": asdict(config), "base": edits[0].record.base, "discarded_energy": lost,
            "requests": [i for record in edits.records() for i in record.requests],
            "weights": {module: lm.digest(module) for module in edits[0].modules},
        }  # fmt: skip
        (scratch / "metake.json").write_text(json.dumps(told, indent=1, ensure_ascii=False), encoding="utf-8")
    return lost


def served(folder: str | Path) -> str:
    """What a server must allow for the adapter in a folder."""
    with reading(folder, "holds no adapter", "export it again"):
        rank = int(read_json(Path(folder) / "adapter_config.json")["r"])
    enough = next((size for size in SERVED if size >= rank), None)
    allowed = f"max_lora_rank {enough} in vLLM" if enough else f"vLLM takes at most {SERVED[-1]}, compress it: --rank"
    return f"rank {rank}; a server must allow it: {allowed}"
