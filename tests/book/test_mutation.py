"""The notebook tests would notice: a wrong constant in a method, in a metric or in a plotted column fails a named page.

Each change is made in a copy of the package, and the page's recorded outputs are compared with what the copy computes.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("quickstart", "geometry_of_beta")  # two that take seconds
MUTATIONS = {  # what is changed: the page that notices, the file, its line, and what the line becomes
    "method": ("quickstart", "editing/editor.py", "return 1 / (count - index)", "return 1 / (count - index + 1)"),
    "metric": (
        "quickstart", "scoring/evaluation.py", "fmean(log_p[span]), correct", "0.98 * fmean(log_p[span]), correct"
    ),
    "plotted column": (
        "geometry_of_beta", "experiments/theory/geometry_of_beta.py", '"beta": attenuation(gamma).item()',
        '"beta": 1.01 * attenuation(gamma).item()'
    ),
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what a page needs: package, recordings, notebooks, and how outputs are compared."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "metake", root / "metake", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "results", root / "results")
    (root / "notebooks").mkdir()
    for name in PAGES:
        shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", root / "notebooks")
    for name in ("conftest.py", "_config.yml"):
        shutil.copy(ROOT / name, root)
    return root


def compare(root, *pages):
    """pytest --nbval on pages of the copy, up to the first difference; gives exit code and what it said."""
    words = [
        "--nbval", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(root), "-c", os.devnull
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, *(str(root / "notebooks" / f"{page}.ipynb") for page in pages)],
        cwd=root, env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_the_copy_as_it_is_passes(checkout):
    code, said = compare(checkout, *PAGES)
    assert code == 0, said[-3000:]


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_wrong_constant_fails_a_named_page(checkout, what):
    page, name, right, wrong = MUTATIONS[what]
    file = checkout / "metake" / name
    source = file.read_text("utf-8")
    assert source.count(right) == 1, f"{name} no longer has {right!r} once: choose another constant"
    file.write_text(source.replace(right, wrong), "utf-8")
    try:
        code, said = compare(checkout, page)
    finally:
        file.write_text(source, "utf-8")
    assert code == 1 and re.search("mismatch '(text/plain|stdout)'", said), said[-3000:]
