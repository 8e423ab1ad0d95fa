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


def record_command(name: str) -> str:
    """What makes the recording `name` (part-model) again. The data files that it needs are named in its provenance."""
    part, _, model = name.partition("-")
    if part.startswith("gpu_"):
        return "make gpu; make gpu-import FOLDER=runs/gpu"
    return f".venv/bin/metake record --only {part}" + f" --model {model}" * bool(model)


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
            body.append(nodes.paragraph("", f"Made by: {record_command(name)}"))
    return [
        nodes.raw("", f'<details class="metake-provenance"><summary>{short}</summary>', format="html"), *body,
        nodes.raw("", "</details>", format="html")
    ]
