"""What is imported when: a help, a list and a mistyped word wait for no model's machinery, nor does `import metake`.

Judged by what a fresh process has loaded in the end, not by a clock.
"""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import jedi
import pytest

import metake as mk
from metake import methods
from metake.commands import cli, listing, options
from metake.language.model import DTYPES

LIGHT = {"metake", "lazy_loader"}
DRIVER = """
import sys
there = set(sys.modules)
code = 0
try:
    {call}
except SystemExit as exit:
    code = exit.code
loaded = {{name.partition(".")[0] for name in set(sys.modules) - there}} - set(sys.stdlib_module_names)
print("\\n" + repr((code, sorted(loaded))))
"""


def loaded(call: str, folder: Path) -> tuple[int, set[str]]:
    """The exit code of a call in a fresh process, and the packages outside Python itself that it loaded."""
    words = [sys.executable, "-c", DRIVER.format(call=call)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    code, names = ast.literal_eval(done.stdout.splitlines()[-1])
    return code, set(names)


def command(words: str) -> str:
    return f"from metake.commands.cli import main; code = main({words.split()!r})"


@pytest.mark.parametrize(("words", "code"), {
    "--help": 0, "--version": 0, "methods": 0, "figure --list": 0, "figure": 0,
    "rnu": 2, "run": 2, "run --out a --metod memit": 2, "run --out a --method memti": 2,
    "run --out a --dtype float3": 2, "run --out a --edits 0": 2,
    "stats --model": 2, "figure atenuation": 2, "figure ablation -p edit=3": 2,
    "figure ablation -p edits=many": 2, **{f"{name} --help": 0 for name, *_ in cli.COMMANDS},
}.items())  # fmt: skip
def test_what_computes_nothing_loads_nothing(tmp_path, words, code):
    assert loaded(command(words), tmp_path) == (code, LIGHT)


def test_what_computes_is_seen_to_load(tmp_path):
    code, names = loaded(command("stats --model tniy"), tmp_path)
    assert code == 2 and names > LIGHT | {"torch", "transformers"}


def test_the_listed_methods_are_those_that_exist():
    docstrings = {name: " ".join(function.__doc__.split()) for name, function in methods.METHODS.items()}
    assert list(listing.methods().items()) == list(docstrings.items())
    readings = {"metake": methods.CHOSEN, "metake/whole": methods.WHOLE, "metake/literal": methods.LITERAL}
    for name, make in methods.OPERATORS.items():
        reading, base = listing.operators()[name]
        assert make.keywords["base"].__name__ == base
        assert make.keywords.get("reading", methods.CHOSEN) == readings[reading]
    assert list(listing.operators()) == list(methods.OPERATORS)
    texts = {name: (d.option, d.usual) for name, d in (methods.DIFFERENCES | methods.GRADIENT_DIFFERENCES).items()}
    assert list(listing.differences().items()) == list(texts.items())
    assert listing.names() == list(methods.named())


def test_the_dtypes_are_those_that_load_takes():
    assert options.DTYPES == tuple(DTYPES)


# import metake


def test_importing_the_package_loads_nothing(tmp_path):
    assert loaded("import metake; dir(metake), metake.__version__, metake.MetakeError", tmp_path) == (0, LIGHT)


def stub() -> tuple[dict[str, str], list[str]]:
    """Of `__init__.pyi`, which editors and type checkers read: name → the module that has it; and its `__all__`."""
    body = ast.parse(Path(mk.__file__).with_suffix(".pyi").read_text("utf-8")).body
    homes = {name.name: node.module for node in body if isinstance(node, ast.ImportFrom) for name in node.names}
    (public,) = (ast.literal_eval(node.value) for node in body if isinstance(node, ast.Assign))
    return homes, public


def test_every_public_name_is_what_its_module_has():
    homes, public = stub()
    assert sorted(public) == sorted(homes) == sorted(mk.__all__) == sorted(dir(mk))
    for name, home in homes.items():
        module = importlib.import_module(f"metake.{home or name}")
        assert getattr(mk, name) is (getattr(module, name) if home else module)


def test_a_notebook_completes_the_public_names():
    seen = {found.name for found in jedi.Interpreter("mk.", [{"mk": mk}]).complete()}
    assert seen >= set(mk.__all__)
    (load,) = jedi.Interpreter("mk.load(", [{"mk": mk}]).get_signatures()
    assert [parameter.name for parameter in load.params] == ["name", "dtype", "device", "source"]


def test_a_name_that_does_not_exist_is_answered_with_near_ones():
    with pytest.raises(AttributeError, match=r"unknown name in metake 'evalute'\. Did you mean 'evaluate'"):
        mk.evalute  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'alpha_edit'"):
        from metake import alpha_edit  # noqa: F401
    assert not hasattr(mk, "geometry") and hasattr(mk, "statistics") and callable(mk.statistics)
