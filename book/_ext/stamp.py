"""Where a page comes from, as the build sees it: commits, versions, digests of model and data, seeds, device,
minutes.
"""

import ast
import functools
import hashlib
import json
import platform
import shlex
import subprocess
from importlib import metadata
from pathlib import Path

import yaml
from docutils import nodes

PACKAGES = ("metake", "torch", "transformers", "numpy", "pandas", "matplotlib", "papermill")
EMBEDDED = {"file of model tiny": "metake/data/tiny/model.safetensors", "embedded facts": "metake/data/facts.toml"}
# two things of one model have a digest each: its file, and the weight that a recording checks it by
DIGESTED = {"model_digest": "digest of the model's last MLP weight"}
GPU = "make gpu; make gpu-import FOLDER=runs/gpu"
# recordings whose sizes follow --edits, and --batch; the others have their own
BATCHED = ("comparison", "operators", "hidden_states", "gamma")
SIZED = (*BATCHED, "ablation", "realized", "kl_strength", "sensitivity", "streams", "streams_zsre")
SEEDED = (*SIZED, "sequences", "asking")
TOKENS = "100000"  # of the text, that `metake record` reads if it is not told
USUAL = 100  # what `metake record` takes of both, if it is not told
UNKNOWN = "not known: not built in a git checkout"


def defaults(root: Path, page: str) -> dict:
    """A page's parameters with their values, from its tagged cell."""
    cells = json.loads((root / f"{page}.ipynb").read_text("utf-8"))["cells"]
    source = next("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", ()))
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
    }


def parameters(values: dict) -> str:
    """Options of papermill that give a page these values: numbers and words by -p, the rest by -y as YAML."""
    words = []
    for name, value in values.items():
        if isinstance(value, bool | list | dict | None) or (isinstance(value, str) and not is_word(value)):
            words += [
                "-y",
                shlex.quote(
                    yaml.safe_dump({name: value}, default_flow_style=True, width=10**6, allow_unicode=True).strip()
                ),
            ]
        else:
            words += ["-p", name, shlex.quote(str(value))]
    return " ".join(words)


def is_word(text: str) -> bool:
    """Whether papermill's -p leaves a text a text."""
    if text in ("True", "False", "None", "null", ""):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False


def record_command(root: Path, name: str) -> str:
    """What makes the recording `name` (part-model) again: as its own header says, or as it would be made first."""
    file, (part, _, model) = root / "results" / f"{name}.jsonl", name.partition("-")
    if not file.is_file():
        return GPU if part.startswith("gpu_") else f".venv/bin/metake record --only {part} --model {model}"
    with file.open(encoding="utf-8") as lines:
        return remade(name, json.loads(next(lines))["provenance"])


def remade(name: str, origin: dict) -> str:
    """The command with the data files, the text and the sizes that a recording's provenance names."""
    part = name.partition("-")[0]
    if part.startswith("gpu_"):
        return GPU
    files = [told.split()[0] for told in origin["dataset"].split(", ")]
    given = dict(zip(("--counterfact", "--zsre"), files, strict=False))
    text, _, tokens = origin.get("statistics", "embedded").partition(", ")
    given["--text"] = text
    given = {option: file for option, file in given.items() if file not in ("facts", "facts-zsre", "embedded")}
    if (tokens := tokens.removesuffix(" tokens")) not in ("", TOKENS):
        given["--text-tokens"] = tokens
    if tasks := origin.get("tasks"):
        given["--tasks"] = tasks.split()[0]
    if part in SIZED:
        edits = origin.get("edits", origin.get("requests")) // (10 if part.startswith("streams") else 1)
        given |= {"--edits": edits} if edits != USUAL else {}
        given |= {"--batch": origin["batch"]} if part in BATCHED and origin["batch"] != USUAL else {}
    if part in SEEDED and (seeds := origin.get("seeds", [0])) != [0]:
        given["--seeds"] = " ".join(map(str, seeds))
    options = "".join(f" {option} {value}" for option, value in given.items())
    return f".venv/bin/metake record --only {part} --model {origin['model']}{options}"


@functools.cache
def git(root: Path, *arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


@functools.cache
def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def minutes(root: Path, page: str) -> str:
    """How long the page took when `make book` last ran it, if that was the notebook of now."""
    ran = root / "_build" / "notebooks-run" / f"{Path(page).name}.ipynb"
    if not ran.is_file():
        return ""
    run, source = json.loads(ran.read_text("utf-8")), json.loads((root / f"{page}.ipynb").read_text("utf-8"))
    if [c["source"] for c in run["cells"]] != [c["source"] for c in source["cells"]]:
        return ""
    return f"{run['metadata']['papermill']['duration'] / 60:.1f}"


def flat(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {flat(v)}" for k, v in value.items())
    return ", ".join(map(flat, value)) if isinstance(value, list) else str(value)


def rows(root: Path, page: str) -> dict[str, str]:
    """What holds for all that the page recomputes."""
    built, dirty = git(root, "rev-parse", "HEAD"), git(root, "status", "--porcelain", "--untracked-files=no")
    given = defaults(root, page)
    found = {
        "page last changed": git(root, "log", "-1", "--format=%H, %cs", "--", f"{page}.ipynb") or UNKNOWN,
        "book built from": (f"{built}{', with local changes' if dirty else ''}") if built else UNKNOWN,
        **{name: f"sha256 {digest(root / file)}" for name, file in EMBEDDED.items()},
        "seed": ", ".join(f"{k} {v}" for k, v in given.items() if k in ("seed", "seeds")),
        "device": "cpu, float64" if given.get("model", "tiny") == "tiny" else "",
        "minutes": minutes(root, page),
        "versions": flat({"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}),
    }
    return {name: text for name, text in found.items() if text}


def recording(root: Path, name: str) -> dict[str, str] | None:
    """The provenance in a recording's own header; None if it was not made yet."""
    file = root / "results" / f"{name}.jsonl"
    if not file.is_file():
        return None
    with file.open(encoding="utf-8") as lines:
        return {
            DIGESTED.get(key, key.replace("_", " ")): flat(value)
            for key, value in json.loads(next(lines))["provenance"].items()
            if value not in (None, "")
        }


def entries(title: str, found: dict[str, str]) -> list[nodes.Node]:
    items = [
        nodes.definition_list_item("", nodes.term("", key), nodes.definition("", nodes.paragraph("", text)))
        for key, text in found.items()
    ]
    return [
        nodes.paragraph("", title, classes=["metake-stamp-title"]),
        nodes.definition_list("", *items, classes=["metake-stamp"]),
    ]


def stamp(root: Path, page: str, recordings) -> list[nodes.Node]:
    """The stamp of a page, and of each recording that it shows."""
    found = rows(root, page)
    short = (
        f"Provenance: commit {found['book built from'][:10]}" if found["book built from"] != UNKNOWN else "Provenance"
    )
    body = entries("What this page recomputes", found)
    for name in recordings:
        if origin := recording(root, name):
            body += entries(f"Recorded: results/{name}.jsonl", origin)
            body.append(nodes.paragraph("", f"Made by: {record_command(root, name)}"))
    return [
        nodes.raw("", f'<details class="metake-provenance"><summary>{short}</summary>', format="html"), *body,
        nodes.raw("", "</details>", format="html")
    ]
