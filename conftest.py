"""Notebook tests compare what a notebook prints (text/plain, stdout), not pixels, markup or library chatter; what takes
longest is begun first.
"""

import os
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "tools"))
from kernels import fork_kernels  # noqa: E402

SCRATCH = tempfile.TemporaryDirectory(prefix="metake-test-")  # tests never overwrite figures/ or results/verdicts/
os.environ |= {
    "METAKE_FIGURES": os.path.join(SCRATCH.name, "figures"),
    "METAKE_VERDICTS": os.path.join(SCRATCH.name, "verdicts"),
    "MPLBACKEND": "agg",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}
# Begun first, so that no process is left alone with one of them at the end (with --no-loadscope-reorder).
LONGEST = (
    "test_contract", "test_gpu_hour", "test_hypergradient", "test_mutations", "test_crashes", "test_runs",
    "test_targets", "test_case_study", "test_pipeline", "test_bench", "test_tasks", "test_methods", "test_cli",
    "test_study", "hidden_states", "gamma_beforehand", "does_metake_hold", "general_ability", "editing_requirement",
    "dominance", "main_comparison", "open_readings", "sensitivity",
)  # fmt: skip
MARKUP = ("image/svg+xml", "text/html")  # the same numbers stand in text/plain
NOT_COMPARED = ("stderr", *MARKUP, *(f"application/papermill.record/{kind}" for kind in (*MARKUP, "image/png")))


def pytest_collectstart(collector):
    if getattr(collector, "path", None) and collector.path.suffix == ".ipynb" and hasattr(collector, "skip_compare"):
        collector.skip_compare += NOT_COMPARED
        fork_kernels()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
