"""A clone stays light: drawings are most of the tree, and stand in it as files and within the pages."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST = 40 * 2**20


def test_the_tracked_tree_weighs_little():
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("no git here, or not a clone")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    sizes = {name: (ROOT / name).stat().st_size for name in listed.split("\0") if (ROOT / name).is_file()}
    heaviest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:12]
    assert sum(sizes.values()) <= MOST, f"{sum(sizes.values()) / 2**20:.1f} MiB, most of it in {', '.join(heaviest)}"
