"""Notebook tests compare what a notebook prints (text/plain, stdout), not pixels, markup or library chatter."""

import os
import tempfile

SCRATCH = tempfile.TemporaryDirectory(prefix="metake-test-")  # tests never overwrite figures/ or results/verdicts/
os.environ |= {
    "METAKE_FIGURES": os.path.join(SCRATCH.name, "figures"),
    "METAKE_VERDICTS": os.path.join(SCRATCH.name, "verdicts"),
    "MPLBACKEND": "agg",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}
MARKUP = ("image/svg+xml", "text/html")  # the same numbers stand in text/plain
NOT_COMPARED = ("stderr", *MARKUP, *(f"application/papermill.record/{kind}" for kind in (*MARKUP, "image/png")))


def pytest_collectstart(collector):
    if getattr(collector, "path", None) and collector.path.suffix == ".ipynb" and hasattr(collector, "skip_compare"):
        collector.skip_compare += NOT_COMPARED
