"""Recordings can be made again: their records, digests and commands are kept, complete, and those of the files."""

import hashlib
import importlib
import json
import shlex
import zlib
from pathlib import Path

import pytest

from metake.commands import cli
from metake.data.facts import facts
from metake.experiments import record
from metake.experiments.portable import portable_facts

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "results").glob("*.jsonl"))
KEPT = json.loads((ROOT / "results" / "records.json").read_text("utf-8"))
OTHER = {"open_readings-smollm2-135m"}  # named on the page Reproduce: of other sizes than the command makes today


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        yield importlib.import_module("records")


@pytest.fixture(scope="module")
def stamp():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "book" / "_ext")
        yield importlib.import_module("stamp")


def head(file):
    with file.open(encoding="utf-8") as lines:
        return json.loads(next(lines))


def of(file):
    """The data files that a recording names, each with its digest; what is measured on a device may have none."""
    return [told for told in head(file)["provenance"].get("dataset", "").split(", ") if told]


def test_the_kept_records_are_those_of_the_recordings(tool):
    assert tool.written(ROOT) == (ROOT / "results" / "records.json").read_text("utf-8"), "run tools/records.py"
    assert {file.stem for file in FILES} == KEPT["recordings"].keys()
    for file in FILES:
        assert KEPT["recordings"][file.stem]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        named = {data for data in KEPT["recordings"][file.stem]["records"]}
        assert named <= {told.split()[0] for told in of(file)}


def test_a_recording_of_other_records_is_noticed(tool, tmp_path):
    (tmp_path / "results").mkdir()
    file = tmp_path / "results" / "ablation-m.jsonl"
    rows = [["CounterFact", "7"], ["CounterFact", None], ["ZsRE", "1"], ["CounterFact", "3"], ["CounterFact", "7"]]
    told = {"provenance": {"dataset": "a.json sha256:1, b.json sha256:2"}, "columns": ["dataset", "id"]}
    file.write_text("\n".join(map(json.dumps, [told, *rows])))
    assert tool.used(file) == {"a.json": ["7", "3"], "b.json": ["1"]}
    first = tool.read(tmp_path)
    assert first["orders"]["ablation-m a.json"] == "7 3"
    file.write_text("\n".join(map(json.dumps, [told, *rows[::-1]])))
    assert tool.read(tmp_path)["recordings"] != first["recordings"]


def test_every_data_file_has_the_digest_that_the_recordings_name():
    named = {tuple(told.split()) for file in FILES for told in of(file)}
    kept = {name: one["digest"] for name, one in KEPT["files"].items()}
    kept |= {"facts": facts().digest, "facts-zsre": facts(format="zsre").digest}
    kept["facts-portability"] = portable_facts().digest
    assert named == {(name, f"sha256:{digest[:16]}") for name, digest in kept.items()}
    for name, one in KEPT["files"].items():
        known = one["records"].split()
        used = {i for order, ids in KEPT["orders"].items() if order.endswith(f" {name}") for i in ids.split()}
        assert len(known) == len(set(known)) == 800
        # those of a layout without ids are named by their place
        assert used <= (set(known) if one["known by"] == "case_id" else set(map(str, range(len(known)))))


def test_a_data_file_is_cut_from_the_published_one(tool, tmp_path):
    asked = [{"src": f"Where is {name}?", "subject": name, "alt": "Rome", "answers": ["Paris"], "rephrase": f"{name}?",
              "loc": "nq question: who", "loc_ans": "he"} for name in ("Ada", "Bob", "Cyd")]  # fmt: skip
    wanted, published, out = tmp_path / "zsre.json", tmp_path / "published.json", tmp_path / "out.json"
    wanted.write_text(json.dumps([asked[2], asked[0]]))
    published.write_text(json.dumps(asked))
    known = tool.know(wanted)
    assert known["records"] == " ".join(str(zlib.crc32(asked[i]["src"].encode())) for i in (2, 0))
    tool.make(known, published, out)
    assert json.loads(out.read_text()) == [asked[2], asked[0]]
    published.write_text(json.dumps([asked[0] | {"rephrase": "Who is Ada?"}, asked[2]]))
    with pytest.raises(SystemExit, match="read otherwise"):
        tool.make(known, published, out)
    assert not out.exists()
    published.write_text(json.dumps(asked[:2]))
    with pytest.raises(SystemExit, match="lacks 1 of 2 records"):
        tool.make(known, published, out)


@pytest.mark.parametrize("file", [f for f in FILES if not f.stem.startswith("gpu_")], ids=lambda file: file.stem)
def test_the_printed_command_makes_a_recording_of_its_sizes(file, stamp):
    """Read as the command line reads it, and compared with what the recording says of itself."""
    origin = head(file)["provenance"]
    printed = shlex.split(stamp.record_command(ROOT, file.stem))
    assert printed[0] == ".venv/bin/metake"
    args = cli._parser().parse_args(printed[1:])
    data = {"CounterFact": args.counterfact or "facts", "ZsRE": args.zsre or "facts-zsre"}
    names = [told.split()[0] for told in origin["dataset"].split(", ")]
    assert names == [*data.values()][: len(names)] and args.model == origin["model"]
    assert f"{args.text}, {args.text_tokens} tokens" == origin["statistics"].replace("/", "")
    common = {"model": args.model, "text": args.text, "text_tokens": args.text_tokens}
    if file.stem in OTHER:
        assert f"`{file.stem}` has" in (ROOT / "book" / "reproduce.md").read_text("utf-8")
        return
    part = record._parts(common, data, args.edits, args.batch, args.seeds, Path("runs"), args.tasks or "")[args.only[0]]
    made = getattr(part, "keywords", {})
    asked = {name: made[name] for name in ("edits", "batch", "seeds", "pool", "every") if name in made}
    if "batches" in made:
        asked["edits"] *= made["batches"]
    told = {name: origin.get({"pool": "requests"}.get(name, name)) for name in asked}
    assert {name: list(x) if name == "seeds" else x for name, x in asked.items()} == told
