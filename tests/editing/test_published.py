"""Key statistics that others publish: read as they are, for the layer their name tells, and refused in one line."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from models import random_model

from metake import ParameterError, StatisticsError, statistics

KEYS = torch.randn(300, 128, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
SECOND = "util.runningstats.SecondMoment()"


@pytest.fixture(scope="module")
def model():
    return random_model("gpt2")


def write(folder: Path, layer: int, moment=None, count=300, kind=SECOND, name="transformer.h.{}.mlp.c_proj") -> Path:
    """A file as `save_cached_state` of the ROME code writes it: NumPy's archive of a flat dictionary."""
    moment = (KEYS.T @ KEYS).numpy().astype(np.float32) if moment is None else moment
    told = {"constructor": "util.runningstats.CombinedStat()", "mom2.constructor": kind, "mom2.count": count}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name.format(layer)}_float32_mom2_100000.npz"
    np.savez(file, **told, **{"mom2.mom2": moment}, sample_size=100000)
    return file


def test_they_are_what_their_file_holds(model, tmp_path):
    folder = tmp_path / "gpt2-xl" / "wikipedia_stats"
    for layer in (1, 2, 12):  # a name that begins alike is another layer's
        write(folder, layer, ((KEYS * layer).T @ (KEYS * layer)).numpy().astype(np.float32))
    found = statistics(model, str(folder), layers=[2, 1])
    for layer in (1, 2):
        assert found[layer].count == 300 and torch.equal(found[layer].moment, found[layer].moment.T)
        torch.testing.assert_close(found[layer].moment, layer**2 * KEYS.T @ KEYS, rtol=1e-5, atol=1e-4)
    assert found.source == {"text": f"{tmp_path.name}/gpt2-xl/wikipedia_stats", "tokens": 300, "model": model.name}
    alone = statistics(model, str(folder / "transformer.h.1.mlp.c_proj_float32_mom2_100000.npz"), layers=[1])
    assert torch.equal(alone[1].moment, found[1].moment) and alone[1].null_rank(0.5) == found[1].null_rank(0.5)
    assert len(found.digest) == 64 and found.digest != alone.digest
    assert statistics(random_model("gpt2", seed=1), str(folder), layers=[2, 1]).digest != found.digest
    write(folder, 2)
    assert statistics(model, str(folder), layers=[2, 1]).digest != found.digest


ROTTEN = {
    "another width": ({"moment": np.eye(64, dtype=np.float32)}, r"moments of \(64, 64\); expected at least 128 keys"),
    "too few keys": ({"count": 100}, "100 keys, moments"),
    "not symmetric": ({"moment": np.triu(np.ones((128, 128), np.float32))}, "not symmetric"),
    "a negative variance": ({"moment": -np.eye(128, dtype=np.float32)}, "negative"),
    "not finite": ({"moment": np.full((128, 128), np.nan, np.float32)}, "not finite"),
    "whole numbers": ({"moment": np.eye(128, dtype=np.int64)}, "int64"),
    "several counts": ({"count": np.array([300, 300])}, "its count is"),
    "a mean": ({"kind": "util.runningstats.Mean()"}, "Mean"),
    "pickled objects": ({"moment": np.array([[{}]], dtype=object)}, "allow_pickle"),
}


@pytest.mark.parametrize("name", ROTTEN)
def test_what_is_none_is_refused_in_one_line(model, tmp_path, name):
    given, said = ROTTEN[name]
    file = write(tmp_path, 1, **given)
    with pytest.raises(StatisticsError, match=said) as caught:
        statistics(model, str(tmp_path), layers=[1])
    assert file.name in str(caught.value) and "\n" not in str(caught.value)


def test_a_torn_file_a_false_one_and_one_that_claims_terabytes(model, tmp_path):
    good = write(tmp_path, 1).read_bytes()
    file = tmp_path / "transformer.h.1.mlp.c_proj_float32_mom2_100000.npz"
    for content in (good[:-40], good[: len(good) // 2], b"", good[:3000] + b"xx" + good[3002:], b"\x93NUMPY"):
        file.write_bytes(content)
        with pytest.raises(StatisticsError, match="damaged"):
            statistics(model, str(tmp_path), layers=[1])
    with zipfile.ZipFile(file, "w") as archive, zipfile.ZipFile(write(tmp_path / "other", 1)) as true:
        for name in true.namelist():
            header = io.BytesIO()
            told = {"descr": "<f4", "fortran_order": False, "shape": (10**7, 10**7)}
            np.lib.format.write_array_header_1_0(header, told)
            archive.writestr(name, header.getvalue() if name == "mom2.mom2.npy" else true.read(name))
    with pytest.raises(StatisticsError, match="damaged"):
        statistics(model, str(tmp_path), layers=[1])


def test_a_layer_needs_one_file_of_its_own_name(model, tmp_path):
    write(tmp_path, 12), write(tmp_path, 1, name="model.layers.{}.mlp.down_proj")
    with pytest.raises(StatisticsError, match=r"one file of layer 1 .*mlp\.c_proj_….npz; found model\.layers"):
        statistics(model, str(tmp_path), layers=[1])
    write(tmp_path, 1), (tmp_path / "transformer.h.1.mlp.c_proj_float64_mom2.npz").write_bytes(b"")
    with pytest.raises(StatisticsError, match="one file of layer 1"):
        statistics(model, str(tmp_path), layers=[1])
    with pytest.raises(StatisticsError, match=r"found no \.npz file"):
        (tmp_path / "empty").mkdir()
        statistics(model, str(tmp_path / "empty"), layers=[1])
    with pytest.raises(ParameterError, match="leave tokens=50 out"):
        statistics(model, str(tmp_path), layers=[1], tokens=50)
