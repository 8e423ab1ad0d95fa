"""What is written to disk is whole or not there, and what is read back is what was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from metake.support import storage


def visible(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.glob("*") if entry.suffix != ".lock")


def write(path: Path, content: str, folder: bool) -> None:
    if folder:
        path.mkdir()
        path = path / "inside"
    path.write_text(content)


def read(path: Path) -> str:
    return (path / "inside" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("before", [False, True], ids=["new", "replaced"])
def test_atomic_path_replaces_on_success_only(tmp_path, folder, before):
    path = tmp_path / "deep" / "name.json"
    if before:
        path.parent.mkdir()
        write(path, "old", folder)
    for failure in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(failure), storage.atomic_path(path) as partial:
            write(partial, "half", folder)
            assert not list(path.parent.glob("name*")) or before
            raise failure
        assert visible(path.parent) == (["name.json"] if before else [])
        assert not before or read(path) == "old"
    with storage.atomic_path(path) as partial:
        write(partial, "new", folder)
    assert read(path) == "new" and visible(path.parent) == ["name.json"]


def test_atomic_path_keeps_the_old_folder_when_nothing_was_written(tmp_path):
    write(tmp_path / "name", "old", folder=True)
    with pytest.raises(OSError), storage.atomic_path(tmp_path / "name"):
        pass
    assert read(tmp_path / "name") == "old" and visible(tmp_path) == ["name"]


def test_atomic_path_keeps_the_old_folder_when_the_rename_fails(tmp_path, monkeypatch):
    write(tmp_path / "name", "old", folder=True)
    rename = storage.os.replace

    def fails_once(source, target):
        if Path(source).suffix == ".partial":
            raise PermissionError(source)
        rename(source, target)

    monkeypatch.setattr(storage, "_exchange", lambda *_: False)  # as where a system cannot
    monkeypatch.setattr(storage.os, "replace", fails_once)
    with pytest.raises(PermissionError), storage.atomic_path(tmp_path / "name") as partial:
        write(partial, "new", folder=True)
    assert read(tmp_path / "name") == "old" and visible(tmp_path) == ["name"]
    (tmp_path / "name").rename(tmp_path / f".name.{'0' * 12}.retired")  # killed between the two renames
    monkeypatch.setattr(storage.os, "replace", rename)
    with pytest.raises(ZeroDivisionError), storage.atomic_path(tmp_path / "name") as partial:
        1 / 0  # noqa: B018
    assert read(tmp_path / "name") == "old" and visible(tmp_path) == ["name"]
    with storage.atomic_path(tmp_path / "name") as partial:
        write(partial, "new", folder=True)
    assert read(tmp_path / "name") == "new" and visible(tmp_path) == ["name"]


def test_a_file_is_written_whole_and_as_given(tmp_path, monkeypatch):
    storage.write_file(tmp_path / "file", "old\n")
    storage.write_file(tmp_path / "bytes", b"\0\1")
    assert (tmp_path / "file").read_bytes() == b"old\n" and (tmp_path / "bytes").read_bytes() == b"\0\1"
    monkeypatch.setattr(storage.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        storage.write_file(tmp_path / "file", "new")
    assert read(tmp_path / "file") == "old\n" and visible(tmp_path) == ["bytes", "file"]
