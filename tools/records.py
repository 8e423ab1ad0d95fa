"""Which records the recordings were made on, so that they can be made again: results/records.json.

    python tools/records.py                            write it from results/*.jsonl, after a new recording
    python tools/records.py know FILE                  and from a data file, what a reader needs to make it again
    python tools/records.py make NAME PUBLISHED OUT    the data file NAME again, from the published file it was cut from

A record is known by its `case_id`, or, where a layout has none, by the CRC-32 of its question (`src`).
"""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("id", "request")  # columns of a recording that name a record
DATA = ("CounterFact", "ZsRE")  # what the rows call the files of a recording, in the order of its provenance


def known_by(record: dict) -> int:
    return record["case_id"] if "case_id" in record else zlib.crc32(record["src"].encode())


def used(file: Path) -> dict[str, list[str]]:
    """The ids of a recording's records by data file, in the order in which they were edited or asked."""
    head, *rows = map(json.loads, file.read_text("utf-8").splitlines())
    columns, found = head["columns"], {}
    named = next((columns.index(name) for name in NAMES if name in columns), None)
    if named is None:
        return {}
    files = [told.split()[0] for told in head["provenance"]["dataset"].split(", ")]
    place = columns.index("dataset") if "dataset" in columns else None
    for row in rows:
        data = files[0] if place is None else files[DATA.index(row[place])]
        if row[named] is not None:  # a row of a mean has none
            found.setdefault(data, {})[row[named]] = None
    return {data: [*map(str, ids)] for data, ids in found.items()}


def read(root: Path) -> dict:
    """What records.json says of the recordings: each file's digest, and its records as the first so many of a list.

    Recordings draw their records in one order, so most lists are beginnings of one another: only the longest is kept,
    under the name of the recording that has it.
    """
    files = sorted((root / "results").glob("*.jsonl"))
    lists = {(file.stem, data): ids for file in files for data, ids in used(file).items()}
    longest = sorted(lists, key=lambda key: (-len(lists[key]), key))
    orders: dict[str, list[str]] = {}
    recordings = {}
    for file in files:
        recordings[file.stem] = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "records": {}}
    for name, data in longest:
        ids = lists[name, data]
        order = next((o for o in orders if o.endswith(f" {data}") and orders[o][: len(ids)] == ids), None)
        if order is None:
            order = f"{name} {data}"
            orders[order] = ids
        recordings[name]["records"][data] = [order, len(ids)]
    return {"recordings": recordings, "orders": {name: " ".join(ids) for name, ids in sorted(orders.items())}}


def know(file: Path) -> dict:
    """What identifies a data file's records: their ids in order, and the digest of what the library reads in them."""
    from metake.experiments.cases import read_cases

    records = json.loads(file.read_text("utf-8"))
    by = "case_id" if "case_id" in records[0] else "CRC-32 of src"
    ids = " ".join(str(known_by(record)) for record in records)
    return {"digest": read_cases(str(file)).digest, "known by": by, "records": ids}


def make(wanted: dict, published: Path, out: Path) -> None:
    """Cut a data file out of the published one; refuses what does not have the recorded content."""
    from metake.experiments.cases import read_cases

    by_id = {known_by(record): record for record in json.loads(published.read_text("utf-8"))}
    ids = [*map(int, wanted["records"].split())]
    if missing := [i for i in ids if i not in by_id]:
        sys.exit(f"{published} lacks {len(missing)} of {len(ids)} records, the first is {missing[0]}; another edition?")
    out.write_text(json.dumps([by_id[i] for i in ids], ensure_ascii=False), "utf-8")
    if (found := read_cases(str(out)).digest) != wanted["digest"]:
        out.unlink()
        sys.exit(f"the records of {published} read otherwise: digest {found[:16]}, recorded {wanted['digest'][:16]}")
    print(f"wrote {out}: {len(ids)} records, digest {found[:16]}")


def written(root: Path, *data: Path) -> str:
    """The text of records.json: what is known of data files is kept, and added to."""
    kept = root / "results" / "records.json"
    files = json.loads(kept.read_text("utf-8"))["files"] if kept.is_file() else {}
    files |= {file.name: know(file) for file in data}
    return json.dumps({"files": files, **read(root)}, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", name, published, out]:
            known = json.loads((ROOT / "results" / "records.json").read_text("utf-8"))["files"]
            if name not in known:
                sys.exit(f"no data file {name!r}; known are {', '.join(known)}")
            make(known[name], Path(published), Path(out))
        case ["know", *data]:
            (ROOT / "results" / "records.json").write_text(written(ROOT, *map(Path, data)), "utf-8")
        case []:
            (ROOT / "results" / "records.json").write_text(written(ROOT), "utf-8")
        case _:
            sys.exit(__doc__)
