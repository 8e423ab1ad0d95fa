"""Whatever a file holds, its reader answers with a MetakeError or with what can be used; nothing in it is run.

`make torture` does the same with fifty times as many files.
"""

from __future__ import annotations

import ast
import resource
import struct
from pathlib import Path

import pytest
from crashes import edit
from faults import forked
from fuzz import READERS, fuzz, words

import metake
from metake import Edit, Statistics, counterfact
from metake.language import assets
from metake.support.errors import MetakeError

FORBIDDEN = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "jsonpickle"}
RUNNING = {"eval", "exec", "compile", "__import__"}  # as functions by themselves
LOADING = {("torch", "load"), ("torch", "save"), ("np", "load"), ("pd", "read_pickle"), ("pd", "eval")}


def test_damaged_files_are_refused_or_read_right(tmp_path, one_thread):
    """In a copy of this process, whose memory is bounded; a reader has ten seconds."""
    found = tmp_path / "found"

    def act():
        found.write_text("\n".join(fuzz(tmp_path / "files", 1000, seed=0)) or "all right")

    assert forked(act) == 0, "the reader's process ended"
    assert found.read_text() == "all right"


def test_damaged_values_of_a_page_are_refused_or_of_their_type():
    assert not list(words(2000, seed=0))


@pytest.mark.parametrize("name", READERS)
def test_the_files_are_read_before_they_are_damaged(name, tmp_path):
    files = READERS[name].make(tmp_path)
    READERS[name].use(tmp_path)
    assert files and all(file.stat().st_size for file in files)


def test_a_header_that_claims_ten_gigabytes_takes_none(tmp_path):
    raw = edit(1).save(tmp_path / "edit")
    file = raw / "edit.safetensors"
    (name, good), size = ("edit", file.read_bytes()), 10 * 2**30
    shape = f'{{"{name}:left":{{"dtype":"F64","shape":[{size // 8}],"data_offsets":[0,{size}]}}}}'.encode()
    for bomb in (
        struct.pack("<Q", size) + good[8:], struct.pack("<Q", len(shape)) + shape,
        struct.pack("<Q", len(shape)) + shape + bytes(4096),
    ):  # fmt: skip
        file.write_bytes(bomb)

        def act():
            room = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**28
            resource.setrlimit(resource.RLIMIT_AS, (room, room))
            for read in (Edit.load, lambda _: Statistics.load(file)):
                with pytest.raises(MetakeError, match="is damaged or"):
                    read(raw)

        assert forked(act) == 0
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 10**6)
    with pytest.raises(MetakeError, match="cannot be read"):
        counterfact(deep)


def test_a_record_of_a_fetched_model_names_no_file_outside_its_folder(tmp_path, monkeypatch):
    """What a record names is checked inside the folder, whatever path it writes."""
    monkeypatch.setenv("METAKE_CACHE", str(tmp_path / "cache"))
    outside = tmp_path / "cache" / "secret"
    outside.parent.mkdir()
    outside.write_text("secret")
    folder = tmp_path / "cache" / "smollm2-135m-hub-0123456789ab"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assets._seal(folder, "hub", "0123456789ab", "")
    record = (folder / "source.json").read_text()
    opened = []
    monkeypatch.setattr(assets, "_check", lambda path, *_: opened.append(path))
    for name in ("../secret", str(outside), "a/../../secret"):
        (folder / "source.json").write_text(record.replace("config.json", name))
        assert assets._cached("smollm2-135m", "hub") and opened.pop().parent == folder


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/b"])
def test_a_recording_s_name_is_no_path(name, tmp_path):
    from metake import report

    with pytest.raises(MetakeError, match="cannot name a file"):
        report.recorded(name, tmp_path)


def test_nothing_that_could_run_a_file_is_imported_or_called():
    sources = sorted(Path(metake.__file__).parent.rglob("*.py"))
    assert len(sources) > 150
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.Import(names=names):
                    imported = {alias.name.split(".")[0] for alias in names}
                case ast.ImportFrom(module=module):
                    imported = {(module or "").split(".")[0]}
                case ast.Call(func=ast.Name(id=name)):
                    assert name not in RUNNING, f"{path.name}:{node.lineno} calls {name}"
                    continue
                case ast.Attribute(value=ast.Name(id=owner), attr=name):
                    assert (owner, name) not in LOADING, f"{path.name}:{node.lineno} calls {owner}.{name}"
                    continue
                case _:
                    continue
            assert not imported & FORBIDDEN, f"{path.name} imports {imported & FORBIDDEN}"
