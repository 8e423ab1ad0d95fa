"""What this version writes, once for each release: `python tools/freeze.py` fills tests/artifacts/VERSION/.

A small random model, an edit of it, a run of two batches, key statistics, an adapter and a recording, with the numbers
that later versions must read in them. A folder that is there is never written again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from models import LLAMA, random_weights, small_tokenizer  # noqa: E402

import metake as mk  # noqa: E402
from metake import report  # noqa: E402
from metake.algebra.update import Edit, total  # noqa: E402
from metake.data.facts import facts_records  # noqa: E402
from metake.experiments import runs  # noqa: E402
from metake.language.model import LanguageModel  # noqa: E402
from metake.language.tokens import encode  # noqa: E402

PROMPT = "The capital of France is"
CONFIG = runs.RunConfig("tiny", "alphaedit", "data.json", 2, 1, text="text.txt", dtype="float32", layers=[0, 1])


def base(name: str = "frozen") -> LanguageModel:
    """The frozen model, from the working directory."""
    lm = mk.load("model")
    lm.name, lm.origin = name, {"origin": "frozen", "revision": "", "note": ""}
    return lm


def digest(edit: Edit) -> str:
    """SHA-256 of an edit's factors."""
    found = hashlib.sha256()
    for u in edit.updates:
        found.update(u.left.contiguous().numpy().tobytes() + u.right.contiguous().numpy().tobytes())
    return found.hexdigest()


@torch.no_grad()
def logits(lm: LanguageModel, model: torch.nn.Module | None = None) -> list[float]:
    """The first eight, after the prompt."""
    found = (model or lm.model)(torch.tensor([encode(lm.tokenizer, PROMPT)])).logits[0, -1, :8]
    return [round(x, 5) for x in found.tolist()]


def numbers() -> dict:
    """What is read in the files of the working directory."""
    lm, edit = base(), Edit.load("edit")
    plain = logits(lm)
    with edit.applied(lm):
        edited = logits(lm)
    own, saved = mk.Statistics.load(next(Path("cache/statistics").glob("*.safetensors"))), runs.open_run("run")[1]
    (layer, one), found = next(iter(own.items())), runs.reevaluate("run")
    return {
        "plain": plain, "edited": edited, "edit": digest(edit), "requests": list(edit.record.requests),
        "batches": [digest(batch) for batch in saved], "sum": total(saved).updates[0].delta.norm().item(),
        "metrics": found.metrics, "layer": layer, "count": one.count, "spectrum": one.spectrum[[0, 24, 47]].tolist(),
        "recorded": report.recorded("frozen", Path.cwd()).to_dict("records"),
    }  # fmt: skip


def freeze(folder: Path) -> None:
    """Write everything."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    os.environ["METAKE_CACHE"] = str(folder / "cache")
    own = LLAMA | {"num_hidden_layers": 3, "tie_word_embeddings": True}
    model, tokenizer = random_weights("llama", own, torch.float32), small_tokenizer()
    model.save_pretrained("model"), tokenizer.save_pretrained("model")
    records = [r | {key: r[key][:1] for key in ("paraphrase_prompts", "neighborhood_prompts")} for r in facts_records()]
    records = [{k: v for k, v in r.items() if k not in ("generation_prompts", "reference")} for r in records[:2]]
    Path("data.json").write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", "utf-8")
    told = (f"{r['requested_rewrite']['prompt'].format(r['requested_rewrite']['subject'])} "
            f"{r['requested_rewrite']['target_true']['str']}, as everybody in the city knows." for r in facts_records())
    Path("text.txt").write_text("\n".join(list(told)[:40]) + "\n", "utf-8")
    lm, requests = base(), [case.request for case in mk.counterfact("data.json")]
    editor = mk.methods.memit("tiny", layers=(0, 1))
    edit = editor.edit(lm, requests, mk.statistics(lm, "text.txt", layers=(0, 1)))
    plain = replace(edit.record, trace={}, peak_memory=0)
    replace(edit, record=plain).save("edit")
    edit.to_peft("adapter")
    runs.load = lambda *_: base("tiny")
    runs.run(CONFIG, "run")
    report.write_recorded("frozen", [{"method": "memit", "score": 0.25}, {"method": "rome", "score": None}],
                          {"model": "frozen", "date": "2026-01-01", "commit": "0"}, folder)  # fmt: skip
    Path("numbers.json").write_text(json.dumps(numbers(), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    place = ROOT / "tests" / "artifacts" / mk.__version__
    if place.exists():
        sys.exit(f"{place} is there: what a version has written is not written again")
    freeze(place)
