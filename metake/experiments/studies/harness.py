"""The general-ability tasks through lm-evaluation-harness, for who trusts its machinery more than ours:
pip install "metake[harness]".

It asks which answer is more probable, so its accuracy is that of our "probable" predictions wherever a candidate is one
token; where candidates have several, it compares sums of log-probabilities, AlphaEdit's code and ours their means.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from metake.experiments.studies.items import asked, read_items
from metake.language.model import LanguageModel
from metake.scoring.tasks import TASKS, Task, task
from metake.support.errors import ParameterError


@LanguageModel.entry()
def harness(
    lm: LanguageModel, source: str = "facts", names: Sequence[str] = tuple(TASKS), tests: int = 100,
    reading: str = "corrected", edited: Iterable[str] = ()
) -> dict[str, float]:
    """Accuracy in percent per task, of `lm` as it is now, by `lm_eval.simple_evaluate` on local data alone.

    Arguments: as in `items.read_items` and `items.asked`. Raises ParameterError if lm-eval is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ParameterError(f"this needs lm-evaluation-harness ({error}): pip install 'metake[harness]'") from error
    with tempfile.TemporaryDirectory() as folder:
        wanted = [task(name) for name in names]
        items = [asked(read_items(source, t.file), t, tests, reading, edited) for t in wanted]
        configs = [_config(t, own, reading, Path(folder)) for t, own in zip(wanted, items, strict=True)]
        model = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=16)
        found = simple_evaluate(
            model, tasks=configs, task_manager=TaskManager(include_defaults=False), bootstrap_iters=0, log_samples=False
        )
    return {t.file: 100 * found["results"][f"metake_{t.file}"]["acc,none"] for t in wanted}


def _config(which: Task, items: Sequence[dict], reading: str, folder: Path) -> dict:
    """A task of the harness: its items as questions and the number of the right answer, in a file of their own."""
    file = folder / f"{which.file}.jsonl"
    rows = [{"question": which.prompt(item, reading), "right": which.label(item, reading)} for item in items]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "task": f"metake_{which.file}", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "right",
        "doc_to_choice": list(which.classes), "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
