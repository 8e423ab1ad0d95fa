"""Reference pages that are read off the code and the records when the book is built, so that none of them can be stale.

* ```{api}```         every public name of `metake`: signature and docstring, in the groups below;
a name in no group fails the build.
* ```{commands}```    every command and option of the command line, from its parser.
* ```{recipes}```     every number of every recipe with its source, from metake/recipes.toml.
* ```{recordings}```  every recorded run: what, on what, when, how long; a damaged file fails the build.
* ```{provenance}```  one paragraph on what was recomputed and what was recorded.
* ```{drawing} NAME```  an own drawing (book/drawings/NAME.svg) within the page, so that it takes the theme's colors.
"""

import argparse
import inspect
import json
import re
import textwrap
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import stamp
import yaml
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx import addnodes
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

import metake as mk
from metake.commands import cli
from metake.editing import recipes
from metake.report import METHOD_STYLE

GROUPS = {
    "Edit a model": (
        "load", "LanguageModel", "Editor", "EditorState", "Edit", "EditRecord", "LayerUpdate", "methods", "METHODS"
    ),
    "Requests and data": (
        "EditRequest", "EditCase", "Probe", "batches", "chat", "facts", "dataset", "counterfact",
        "counterfact_cases", "zsre", "zsre_cases", "in_prompt"
    ),
    "Key statistics and metrics": (
        "statistics", "Statistics", "KeyStatistics", "inverse_covariance", "null_space", "InverseCovariance",
        "NullSpace", "Isotropic", "condition"
    ),
    "The solve": ("gate", "realization", "solve", "Solution", "association", "attenuation", "feasible_interval"),
    "Targets and their refinement": ("TargetRule", "Targets", "optimize_targets", "Refinement", "refine"),
    "Edits from gradients": ("GradientEditor", "GradientRule", "train", "Training"),
    "Measure": ("evaluate", "Evaluation", "recall", "diagnose"),
    "Architectures": ("ARCHITECTURES", "Architecture"),
    "Methods and models of one's own": ("testing",),
    "Errors": (
        "MetakeError", "RequestError", "ArchitectureError", "StatisticsError", "ProvenanceError", "NumericalError",
        "ParameterError"
    ),
}
FIRST = {
    "load": 'lm = mk.load("tiny")',
    "facts": "cases = mk.facts(limit=4)",
    "EditRequest": 'request = mk.EditRequest("The capital of {} is", "France", "Rome", "first")',
    "methods": "editor = mk.methods.metake(lm.name)",
    "statistics": "stats = mk.statistics(lm, layers=editor.layers)",
    "diagnose": "print(mk.diagnose(lm, [request], editor, stats))",
    "Editor": "edit = editor.edit(lm, [request], stats)",
    "Edit": 'edit.save("runs/first")',
    "EditorState": "state = editor.init(lm, stats)",
    "batches": "batch = next(iter(mk.batches([c.request for c in cases], 2)))",
    "evaluate": "print(mk.evaluate(lm, cases))",
    "recall": "print(mk.recall(lm, cases))",
    "counterfact": 'cases = mk.counterfact("counterfact.json")',
    "zsre": 'cases = mk.zsre("zsre.json")',
    "chat": "cases = mk.chat(lm, cases)",
    "null_space": "editor = mk.methods.alphaedit(lm.name, metric=mk.null_space(ridge=1.0))",
    "gate": "M = mk.gate(keys, mk.NullSpace(stats))",
    "association": "gamma = mk.association(keys, mk.NullSpace(stats))",
    "feasible_interval": "shortest, longest = mk.feasible_interval(gamma, tau=1.0, epsilon=1.0)",
    "MetakeError": "except mk.MetakeError as problem: print(problem)",
}
WIDTH = 76  # characters of a signature in one line
CODE = re.compile(r"`([^`]+)`")


# Building blocks


def inline(text: str) -> list[nodes.Node]:
    """Text with `code` in it."""
    return [nodes.literal("", part) if i % 2 else nodes.Text(part) for i, part in enumerate(CODE.split(text)) if part]


def paragraph(text: str) -> nodes.paragraph:
    return nodes.paragraph("", "", *inline(text))


def code(text: str, language: str) -> nodes.literal_block:
    return nodes.literal_block(text, text, language=language)


def section(title: str, key: str, *content: nodes.Node, literal: bool = False) -> nodes.section:
    name = nodes.literal("", title) if literal else nodes.Text(title)
    return nodes.section(
        "", nodes.title("", "", name), *content, ids=[re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-")],
        names=[key.lower()]
    )


def table(head: list[str], rows: list[list[str]], widths: list[int]) -> nodes.table:
    """A table of texts with `code` in them."""

    def row(cells):
        return nodes.row("", *(nodes.entry("", paragraph(cell)) for cell in cells))

    group = nodes.tgroup("", *(nodes.colspec(colwidth=width) for width in widths), cols=len(head))
    group += nodes.thead("", row(head))
    group += nodes.tbody("", *map(row, rows))
    return nodes.table("", group)


# Library


def groups() -> dict[str, tuple[str, ...]]:
    """GROUPS, if they hold every public name once."""
    placed = [name for names in GROUPS.values() for name in names]
    if sorted(placed) != sorted(mk.__all__):
        raise ExtensionError(
            "the groups of the API page and metake.__all__ differ in "
            f"{sorted(set(placed) ^ set(mk.__all__)) or 'repeated names'}; see {__file__}"
        )
    return GROUPS


def signature(name: str, thing: object) -> str:
    """As one would write it; over several lines if it is long."""
    try:
        found = inspect.signature(thing)
    except ValueError:
        return name
    parts = []
    for parameter in found.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        known = (
            ""
            if parameter.annotation is parameter.empty
            else f": {inspect.formatannotation(parameter.annotation).strip(chr(39))}"
        )
        default = "" if parameter.default is parameter.empty else f"{' = ' if known else '='}{shown(parameter.default)}"
        parts.append(f"{stars}{parameter.name}{known}{default}")
    gives = (
        ""
        if found.return_annotation in (found.empty, None, "None") or isinstance(thing, type)
        else f" -> {inspect.formatannotation(found.return_annotation).strip(chr(39))}"
    )
    line = f"{name}({', '.join(parts)}){gives}"
    return line if len(line) <= WIDTH else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){gives}"


def shown(default: object) -> str:
    """A default as its author wrote it, as far as Python remembers."""
    text = getattr(default, "__name__", repr(default)) if callable(default) else repr(default)
    return "..." if "<" in text or len(text) > 60 else text


def described(text: str) -> list[nodes.Node]:
    """A docstring: prose flows, aligned lines and equations stay as they are."""
    found = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        lines = block.split("\n")
        kept = any(re.search(r"\S {2,}\S", line) or line.startswith(" ") for line in lines)
        found.append(code(textwrap.dedent(block), "none") if kept else paragraph(" ".join(lines)))
    return found


def own_docstring(thing: object) -> str:
    """A docstring that somebody wrote: neither a data class's own nor an inherited one."""
    text = vars(thing).get("__doc__") if isinstance(thing, type) else inspect.getdoc(thing)
    return (
        ""
        if not text
        or (isinstance(thing, type) and text.startswith(f"{thing.__name__}("))
        or (isinstance(thing, dict | tuple))
        else text
    )


def methods_of(kind: type) -> list[tuple[str, str, str]]:
    """Name, signature and docstring of the public methods and properties that a class, or its part, describes."""
    found = []
    own = (base for base in kind.__mro__ if base.__module__.startswith("metake."))
    for name, thing in (item for base in own for item in vars(base).items()):
        function = getattr(thing, "__func__", getattr(thing, "fget", thing))
        if not name.startswith("_") and inspect.isfunction(function) and inspect.getdoc(function):
            found.append(
                (
                    name,
                    signature(f".{name}", function).replace("() -> ", ": ")
                    if isinstance(thing, property)
                    else signature(f".{name}", function), inspect.getdoc(function)
                )
            )
    return found


def entry(name: str) -> nodes.section:
    thing = getattr(mk, name)
    where = f"In `{thing.__module__.replace('.', '/')}.py`." if hasattr(thing, "__module__") else ""
    if inspect.ismodule(thing):
        found = {f"`methods.{n}`": f for n, f in mk.METHODS.items()}
        if thing is mk.testing:
            found = {f"`{f.__name__}`": f for f in (thing.check_editor, thing.check_model)} | thing.CHECKS
        content = [
            *described(thing.__doc__),
            table(["name", "what"], [[n, " ".join(f.__doc__.partition("\n\n")[0].split())] for n, f in found.items()],
                  [20, 80]),
        ]  # fmt: skip
    elif isinstance(thing, dict):
        content = [paragraph("A dictionary of " + ", ".join(f"`{key}`" for key in thing) + ".")]
    else:
        call = (
            [] if isinstance(thing, type) and issubclass(thing, Exception) else [code(signature(name, thing), "python")]
        )
        content = [*call, *described(own_docstring(thing)), *([paragraph(where)] if where else [])]
    if isinstance(thing, type) and not issubclass(thing, Exception):
        items = [
            nodes.definition_list_item(
                "", nodes.term("", "", nodes.literal("", method)),
                nodes.definition("", code(line, "python"), *described(text))
            )
            for method, line, text in methods_of(thing)
        ]
        content += [nodes.definition_list("", *items)] if items else []
    return section(
        name,
        f"api-{name}-{'constant' if name.isupper() else 'module' if inspect.ismodule(thing) else type(thing).__name__}",
        *content, literal=True
    )


def first_names(page: str) -> nodes.table:
    """The names that are needed first: what each is for, in its docstring's first sentence, an example, its source."""
    found = table(
        ["name, source", "what", "example"], [["", sentence(name), f"`{line}`"] for name, line in FIRST.items()],
        [20, 35, 45]
    )
    for name, row in zip(FIRST, list(found.findall(nodes.row))[1:], strict=True):
        source = source_of(getattr(mk, name))
        row[0][0] += nodes.reference("", "", nodes.literal("", name), refid=identifier(name), internal=True)
        row[0][0] += nodes.Text(" ")
        row[0][0] += addnodes.download_reference(
            "", "", nodes.literal("", Path(source).name), reftype="download", refdomain="", refdoc=page,
            refexplicit=True, refwarn=True, reftarget=f"/{source}"
        )
    return found


def sentence(name: str) -> str:
    """What a name is, in its docstring's first sentence."""
    thing = getattr(mk, name)
    if inspect.ismodule(thing):
        return "The methods, a function each."
    text = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    first = re.split(r"(?<=[^.v])[.:;](?:\s|$)", text)[0]
    return re.sub(r"\s*\([^)]*$", "", first).rstrip(".") + "."


def source_of(thing: object) -> str:
    if inspect.ismodule(thing):
        return Path(thing.__file__).relative_to(Path(mk.__file__).parents[1]).as_posix()
    return f"{thing.__module__.replace('.', '/')}.py"


def identifier(name: str) -> str:
    """The id of a name's own entry."""
    return next(iter(entry(name)["ids"]))


class Api(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        depends(self, *(Path(mk.__file__).parent).rglob("*.py*"))
        first = section("The twenty names that are needed first", "api first", first_names(self.env.docname))
        return [first, *(section(title, f"api {title}", *map(entry, names)) for title, names in groups().items())]


# Command line


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every command's parser, in the order of the help."""
    return next(action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction)).choices


def options(parser: argparse.ArgumentParser) -> list[list[str]]:
    """What may be typed, and what it does with its default in it."""
    form = argparse.HelpFormatter("metake")
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        words = ", ".join(f"`{option}`" for option in action.option_strings) or f"`{action.metavar or action.dest}`"
        value = "" if not action.option_strings or action.nargs == 0 else f" `{action.metavar or action.dest.upper()}`"
        rows.append(
            [
                words + value + (" (required)" if action.required and action.option_strings else ""),
                form._expand_help(action),
            ]
        )
    return rows


class Commands(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        depends(self, cli.__file__, cli.options.__file__)
        found = []
        for name, parser in commands().items():
            parser.formatter_class = partial(argparse.HelpFormatter, width=80)
            content = [
                paragraph(parser.description[0].upper() + parser.description[1:] + "."),
                code(parser.format_usage().removeprefix("usage: ").rstrip(), "none"),
            ]
            if rows := options(parser):
                content.append(table(["option", "what"], rows, [35, 65]))
            found.append(section(f"metake {name}", f"command {name}", *content, literal=True))
        return found


# Recipes


def numbers(model: str) -> list[list[str]]:
    """A model's own numbers; those of all models for "default"."""
    entries = {name: value for name, value in recipes._table()[model].items() if name != "names"}
    return [
        [f"`{name}`", ", ".join(map(said, value)) if isinstance(value, list) else f"{value}", f"`{source}`"]
        for name, (value, source) in entries.items()
        if value != []
    ]


def said(value: Any) -> str:
    """One of a list of numbers; of linear maps, [path, first, last]: the path with its blocks."""
    return str(value) if not isinstance(value, list) else value[0].replace("{}", f"{value[1]}–{value[2]}")


class Recipes(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        depends(self, recipes.__file__.replace("recipes.py", "recipes.toml"))
        found = []
        for model in ("default", *recipes.models()):
            names = recipes._table()[model].get("names", [])
            said = (
                "What a model does not override:"
                if model == "default"
                else "Also known as " + ", ".join(f"`{n}`" for n in names) + "."
                if names
                else ""
            )
            content = [paragraph(said)] if said else []
            found.append(
                section(
                    model, f"recipe {model}", *content,
                    table(["number", "value", "source"], numbers(model), [40, 30, 30]), literal=True
                )
            )
        rows = [[f"`{key}`", text] for key, text in recipes._table()["sources"].items()]
        return [*found, section("Sources", "recipe sources", table(["source", "what it is"], rows, [25, 75]))]


# Recorded runs


def recordings(root: Path) -> list[dict]:
    """The provenance of every file of results/, with its name and number of records; none, or a damaged one,
    is an error.
    """
    found = []
    for path in sorted((root / "results").glob("*.jsonl")):
        try:
            head, *rows = map(json.loads, path.read_text("utf-8").splitlines())
            if head["records"] != len(rows):
                raise ValueError(f"{head['records']} records were written, {len(rows)} are there")
            found.append(
                {
                    "name": path.stem, "records": len(rows), **{k: head["provenance"][k] for k in NEEDED},
                    **head["provenance"]
                }
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ExtensionError(f"{path.name} is damaged or tells too little of its origin: {error}") from error
    if not found:
        raise ExtensionError("results/ holds no recorded run; `make record` makes them")
    return found


NEEDED = ("model", "model_origin", "dataset", "date", "commit", "device", "dtype", "minutes", "versions")
SIZE = ("edits", "batch", "seeds", "seed", "requests")


def recording_row(run: dict) -> list[str]:
    part, _, model = run["name"].partition("-")
    size = ", ".join(
        f"{key} {', '.join(map(str, value)) if isinstance(value := run[key], list) else value}"
        for key in SIZE
        if key in run
    )
    return [
        f"`{part}`", model or run["model"], f"{run['records']} records" + (f"; {size}" if size else ""),
        f"{run['minutes']:g}",
        f"{run['device']}, {run['dtype']}", f"{run['date']}", f"`{commit(run)}`"
    ]


def commit(run: dict) -> str:
    return run["commit"][:10] + ("+changes" if run["commit"].endswith("+changes") else "")


class Recordings(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        found = recordings(root_of(self))
        depends(self, *(root_of(self) / "results").glob("*.jsonl"))
        head = ["recording", "model", "size", "minutes", "computed on", "date", "commit"]
        origins = {
            run["model"]: f"`{run['model']}`: {run['model_origin']['note']}; {run['model_origin']['revision']}"
            for run in found
        }
        data = {text for run in found for text in run["dataset"].split(", ")}
        versions = {", ".join(f"{k} {v}" for k, v in run["versions"].items()) for run in found}
        notes = [
            *origins.values(), "Records, by file and digest: " + "; ".join(sorted(data)) + ".",
            "Versions: " + "; ".join(sorted(versions)) + "."
        ]
        again = code("\n".join(dict.fromkeys(stamp.remade(run["name"], run) for run in found)), "bash")
        return [
            table(head, [recording_row(run) for run in found], [14, 14, 26, 10, 14, 12, 12]), *map(paragraph, notes),
            paragraph("Each of them again, with files of these digests:"), again
        ]


class Records(SphinxDirective):
    """Of every recording: its data files with how many of their records in which order, and its own digest."""

    def run(self) -> list[nodes.Node]:
        root = root_of(self)
        depends(self, root / "results" / "records.json", *(root / "results").glob("*.jsonl"))
        kept = json.loads((root / "results" / "records.json").read_text("utf-8"))
        if differ := set(kept["recordings"]) ^ {run["name"] for run in recordings(root)}:
            raise ExtensionError(f"results/records.json and results/ differ in {sorted(differ)}; run tools/records.py")
        rows = [
            [f"`{name}`", "; ".join(map(records_of, one["records"].items())) or "–", f"`{one['sha256'][:12]}`"]
            for name, one in kept["recordings"].items()
        ]
        return [table(["recording", "records, by file", "SHA-256"], rows, [26, 54, 20])]


def records_of(used: tuple[str, list]) -> str:
    """"counterfact.json: the first 100 of list dispersion-smollm2-135m"."""
    file, (order, count) = used
    return f"{file}: the first {count} of list `{order.split()[0]}`"


class Provenance(SphinxDirective):
    """What was recomputed, what was recorded, on what, when."""

    def run(self) -> list[nodes.Node]:
        root = root_of(self)
        depends(self, root / "_toc.yml", *(root / "results").glob("*.jsonl"))
        parts = yaml.safe_load((root / "_toc.yml").read_text("utf-8"))["parts"]
        pages = [
            chapter["file"]
            for part in parts
            for chapter in part["chapters"]
            if chapter["file"].startswith("notebooks/")
        ]
        runs = recordings(root)
        models = " and ".join(f"`{model}`" for model in sorted({run["model"] for run in runs}))
        devices = " and ".join(sorted({run["device"] for run in runs}))
        first, last = min(run["date"] for run in runs), max(run["date"] for run in runs)
        when = f"on {first}" if first == last else f"from {first} to {last}"
        hours = sum(run["minutes"] for run in runs) / 60
        recomputed = (
            f" {len(pages)} pages, those that need a model on `tiny` with {trained_on(root)}, whenever "
            "the book is built from scratch: no "
            "graphics card, nothing downloaded."
        )
        recorded = f" {len(runs)} runs on {models}, {when}, on {devices}, {hours:.1f} hours together: "
        link = addnodes.pending_xref(
            "", nodes.inline("", "each with its commit, data and device"), refdomain="std", reftype="doc",
            refexplicit=True, refwarn=True, refdoc=self.env.docname, reftarget="/book/compute"
        )
        return [
            nodes.bullet_list(
                "",
                nodes.list_item(
                    "", nodes.paragraph("", "", label("recomputed", "recomputed here"), *inline(recomputed))
                ),
                nodes.list_item(
                    "", nodes.paragraph("", "", label("recorded", "recorded"), *inline(recorded), link, nodes.Text("."))
                ),
                nodes.list_item(
                    "",
                    nodes.paragraph(
                        "", "", label("reported", "reported in the paper"),
                        nodes.Text(" whatever else stands here of the paper's own numbers; never computed by us.")
                    ),
                ),
            )
        ]


def label(kind: str, text: str) -> nodes.inline:
    return nodes.inline("", text, classes=["label", f"label-{kind}"])


def trained_on(root: Path) -> str:
    """The embedded model's size, from its weights' header."""
    with (root / "metake" / "data" / "tiny" / "model.safetensors").open("rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    count = 0
    for name, tensor in head.items():
        if name != "__metadata__":
            size = 1
            for length in tensor["shape"]:
                size *= length
            count += size
    return f"{count / 1e6:.1f} million parameters"


# Drawings


class Drawing(SphinxDirective):
    """An SVG within the page. In it `currentColor` is the text's, {metake} and so on are the methods' colors of every
    figure.
    """

    required_arguments = 1
    option_spec = {"alt": directives.unchanged_required, "caption": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        file = root_of(self) / "book" / "drawings" / f"{self.arguments[0]}.svg"
        depends(self, file)
        if not file.is_file() or not self.options.get("alt"):
            raise ExtensionError(
                f"a drawing needs a file and an alt text; {file.name}: "
                f"{'no alt text' if file.is_file() else 'not there'}"
            )
        svg = drawing(file.read_text("utf-8"), " ".join(self.options["alt"].split()))
        figure = nodes.container("", nodes.raw("", svg, format="html"), classes=["metake-drawing"])
        if caption := self.options.get("caption"):
            figure += nodes.paragraph("", "", *inline(" ".join(caption.split())), classes=["metake-note"])
        return [figure]


def drawing(svg: str, alt: str) -> str:
    """The drawing with the methods' colors, named for readers who do not see it, not wider than it reads well."""
    for method, style in METHOD_STYLE.items():
        svg = svg.replace("{" + method + "}", style.color)
    if unknown := re.findall(r"\{[a-z_/]+\}", svg):
        raise ExtensionError(f"a drawing names colors that no method has: {unknown}")
    return svg.replace(
        "<svg ",
        f'<svg role="img" aria-label="{escape(alt)}" '
        'style="display:block;width:100%;max-width:40rem;height:auto;margin:1rem auto" ', 1
    )


def depends(directive: SphinxDirective, *files: object) -> None:
    for file in files:
        directive.env.note_dependency(str(file))


def root_of(directive: SphinxDirective) -> Path:
    return Path(directive.env.srcdir)


def setup(app):
    for name, directive in (
        ("api", Api), ("commands", Commands), ("recipes", Recipes), ("recordings", Recordings), ("records", Records),
        ("provenance", Provenance), ("drawing", Drawing)
    ):
        app.add_directive(name, directive)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
