"""What tests compute is cached for the session only; what real models and tokenizers need stays in the ordinary
cache.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from models import CONFIGS, random_model

from metake.language.tokens import shared_beginnings

os.fsync = lambda _: None  # what tests write need not outlive a power cut; `faults` sees when it is asked for


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory) -> Path:
    """One for all processes that test side by side: what one has computed the others read, as users' runs do."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def _private_cache(request, monkeypatch, session_cache):
    if not request.node.get_closest_marker("real_model"):
        monkeypatch.setenv("METAKE_CACHE", str(session_cache))


@pytest.fixture
def one_thread():
    """For a test that copies its process: a copy has none of its threads, and waits for them forever."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """An empty project, in which the test runs: figures and verdicts go to its _build."""
    (tmp_path / "_config.yml").touch()
    monkeypatch.chdir(tmp_path)
    for variable in ("METAKE_FIGURES", "METAKE_VERDICTS", "METAKE_RUN"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    """A cache folder of this test alone."""
    monkeypatch.setenv("METAKE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def as_in_large_batches(monkeypatch) -> None:
    """However few the rows: what is common runs once."""
    monkeypatch.setattr(
        "metake.language.model.shared_beginnings", lambda rows, limits, _: shared_beginnings(rows, limits)
    )


@pytest.fixture(params=CONFIGS)
def lm(request):
    """A fresh random model of every architecture row, float64."""
    return random_model(request.param)
