"""The command line: each sub-command parses, calls one library function, and prints what it gives.

A user's mistake ends with exit code 2, an interruption with 130, and both with one line that says what to do next; a
failed check of a model with 1.
A command imports what it needs when it runs: a help, a list and a mistyped word wait for no model's machinery.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import metake as mk
from metake.commands import listing, options
from metake.commands.arguments import Parser
from metake.support.errors import MetakeError

if TYPE_CHECKING:
    from metake.scoring.evaluation import Evaluation


def _methods(_: argparse.Namespace) -> None:
    groups = {
        "Methods": listing.methods(),
        "Gradient family: no targets, no key statistics": listing.methods("GRADIENT"),
        "Fine-tuning of the same weights: baselines": listing.methods("FINE_TUNING"),
        "MetaKE on the gates of other methods": {
            name: f"`{reading}` with `{base}` as its base" for name, (reading, base) in listing.operators().items()
        },
        "Where a paper and its released code differ: what the default does not do": {
            name: f"{own}; by default: {usual}" for name, (own, usual) in listing.differences().items()
        },
    }
    for title, entries in groups.items():
        print(f"{title}:")
        for name, text in entries.items():
            print(f"  {name:<21} {text}")


def _edit(args: argparse.Namespace) -> None:
    from metake.experiments.studies.quickstart import compare

    request = mk.EditRequest(args.prompt, args.subject, args.target, "edit", args.direct)
    lm = mk.load(args.model, args.dtype, args.device)
    if args.chat:
        (request,) = mk.chat(lm, [request])
    editor = mk.methods.method(args.method, args.model, seed=args.seed, **_own_editor(args))
    found = mk.statistics(lm, args.text, layers=editor.layers, tokens=args.text_tokens)
    if editor.layers:  # the gradient family plans nothing that could be diagnosed
        print(mk.diagnose(lm, [request], editor, found))
    edit = editor.edit(lm, [request], found)
    print(compare(lm, edit, request))
    if args.out:
        edit.save(args.out)
        _wrote(args.out)
    if args.peft:
        from metake.experiments.export import served

        _wrote(args.peft, edit.to_peft(args.peft, args.rank), args.rank)
        print(served(args.peft))


def _own_editor(args: argparse.Namespace) -> dict[str, str]:
    """The folder of a trained editor, as a change of the method."""
    return {"editor": args.editor} if args.editor else {}


def _wrote(out: str, lost: Mapping[str, float] = MappingProxyType({}), rank: int | None = None) -> None:
    print(f"wrote {out}" + (f"; discarded energy {max(lost.values()):.2e}" if rank else ""))


def _show(found: Evaluation) -> None:
    if found.before:
        print(f"before  {found.before}")
    print(f"after   {found}")


def _run(args: argparse.Namespace) -> None:
    from metake.experiments import processes, runs

    processes.begin()
    config = runs.RunConfig(
        args.model, args.method, args.data, args.edits, args.batch, args.seed, args.text, args.text_tokens, args.dtype,
        args.generate, _own_editor(args), recipe=args.recipe, layers=args.layers and sorted({*args.layers}),
        chat=args.chat
    )
    result = runs.run(config, args.out, args.device)
    if not processes.place()[0]:  # of several one tells
        _show(result)
        print(f"wrote {args.out}")


def _eval(args: argparse.Namespace) -> None:
    from metake.experiments.runs import reevaluate

    if args.ask:
        from metake.experiments import asking

        print(asking.text(asking.ask(args.folder, args.ask, args.device, args.chat)))
        _wrote(os.path.join(args.folder, "asked.jsonl"))
        return
    _show(reevaluate(args.folder, args.device, args.chat))


def _export(args: argparse.Namespace) -> None:
    from metake.experiments.export import export, served

    out = args.out or f"{args.folder.rstrip('/')}-{args.format}"
    _wrote(out, export(args.folder, out, args.format, args.rank, args.device), args.rank)
    if args.format == "peft":
        print(served(out))


def _diagnose(args: argparse.Namespace) -> None:
    from metake.experiments.cases import read_cases, select

    lm = mk.load(args.model, args.dtype, args.device)
    editor = mk.methods.method(args.method, args.model, seed=args.seed)
    cases = select(lm, read_cases(args.data), args.edits, args.seed)
    found = mk.statistics(lm, args.text, layers=editor.layers, tokens=args.text_tokens)
    print(mk.diagnose(lm, [c.request for c in cases], editor, found, args.tau, args.epsilon))


def _stats(args: argparse.Namespace) -> None:
    from metake.editing.recipes import recipe

    lm = mk.load(args.model, args.dtype, args.device)
    threshold = args.threshold or recipe(args.model).threshold
    found = mk.statistics(lm, args.text, layers=args.layers, tokens=args.text_tokens)
    for layer, one in ((i, waiting.to(lm.device)) for i, waiting in found.items()):
        print(
            f"layer {layer}: {one.count} tokens, d_in {one.dim}, eigenvalues {one.spectrum[0]:.2e} to "
            f"{one.spectrum[-1]:.2e}, null space at {threshold:g}: rank {one.null_rank(threshold)}"
        )


def _layers(args: argparse.Namespace) -> None:
    from metake.experiments.studies import layers

    print(layers.text(layers.layer_sweep(
        args.model, args.method, args.data, args.edits, args.width, args.stride, args.first, args.last, args.recipe,
        args.text, args.text_tokens, args.dtype, args.device, args.seed
    )))  # fmt: skip


def _check(args: argparse.Namespace) -> int:
    from metake.experiments.contract import check_model

    found = check_model(args.model, args.method, args.dtype, args.device, args.text, args.text_tokens, args.seed)
    print(found)
    if args.json:
        found.save(args.json)
        _wrote(args.json)
    return 0 if found.passed else 1


def _fetch(args: argparse.Namespace) -> None:
    from metake.language import assets

    source = assets.fetch(args.model, args.source)
    print(f"{args.model}: {source.path} (from the {source.origin}; {source.note})")


def _record(args: argparse.Namespace) -> None:
    from metake.experiments import record

    for line in record.record(
        args.model, args.counterfact, args.zsre, args.text, args.edits, args.batch, args.seeds, args.only,
        tokens=args.text_tokens, tasks=args.tasks, methods=args.methods, scale=args.scale, out=args.out
    ):
        print(line)


def _train(args: argparse.Namespace) -> None:
    from metake.editing.gradient.training import train
    from metake.experiments.cases import read_cases, select

    changes = {k: getattr(args, k) for k in ("edits", "steps", "seed") if getattr(args, k) is not None}
    rule, modules, training = mk.methods.to_train(args.method, args.model, **changes)
    lm, cases = mk.load(args.model, args.dtype, args.device), read_cases(args.data)
    kept = select(lm, cases, args.holdout, training.seed) if args.holdout else []
    held = {r.text for c in kept for r in c.requests}
    unseen = [c.request.id for c in cases if held & {r.text for r in c.requests}]  # also under another id
    editor = train(lm, select(lm, cases, None), rule, modules, training, unseen, args.out)
    first, last = editor.trained["losses"][0], editor.trained["losses"][-1]
    print(f"−log p of the target after the edits: at first {first['after']:.2f}, in the last step {last['after']:.2f}")
    print(f"trained on {len(editor.trained['ids'])} cases; {len(kept)} kept for evaluation")
    _wrote(args.out)


def _bench(args: argparse.Namespace) -> None:
    from metake.experiments.speed import bench

    found = bench.bench(**{k: v for k, v in vars(args).items() if k not in ("command", "call", "json")})
    print(bench.text(found))
    if args.json:
        bench.write(found, args.json)
        print(f"wrote {args.json}")


def _plan(args: argparse.Namespace) -> None:
    from metake.experiments.speed import plan

    print(plan.told(**{k: v for k, v in vars(args).items() if k not in ("command", "call")}))


def _figure(args: argparse.Namespace) -> None:
    from metake.commands import pages

    if args.list or not args.name:
        width = max(map(len, pages.titles())) + 2
        print("\n".join(f"{name:<{width}}{title}" for name, title in pages.titles().items()))
        return
    out, verdicts = pages.figure(args.name, args.out, args.model, dict(args.p))
    for found in verdicts:
        print(f"{found['verdict']}: {found['claim']}\ndecided by: {found['decided_by']}")
    _wrote(os.path.relpath(out))


GO_ON = {"run": "finished batch", "record": "finished batch", "train": "checkpoint"}
"""After what an interrupted command goes on, if it is given again."""
COMMANDS: tuple[tuple[str, Callable, str], ...] = (
    ("methods", _methods, "list the methods: name, equation, source"),
    ("edit", _edit, "edit one fact and show what changed"),
    ("run", _run, "edit many facts in sequential batches and evaluate them; resumable"),
    ("train", _train, "train an editor of the gradient family; goes on where it stopped"),
    ("eval", _eval, "evaluate a run's saved edits again"),
    ("export", _export, "write a run's total edit as a LoRA adapter, an edit or a whole model"),
    ("diagnose", _diagnose, "before editing: association, attenuation and feasible interval per request"),
    ("bench", _bench, "time the stages of one batch of edits; beside the literal path, if asked"),
    ("plan", _plan, "memory, operations and seconds of a run, before a model is loaded or even here"),
    ("layers", _layers, "which layers of a model to edit: try windows of them, and print a recipe to paste"),
    ("check", _check, "does a model keep every promise of an edit; exit code 1 if not"),
    ("stats", _stats, "key statistics of a model: tokens, spectrum, rank of the null space"),
    ("fetch", _fetch, "download a real model once, checksum verified"),
    ("figure", _figure, "run one page of the book with other parameters, into a folder of its own"),
    ("record", _record, "make the recorded runs of a model that are missing; goes on where it stopped"),
)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="metake", description="Knowledge editing in one formula: an edit is R·M.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"metake {mk.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, call, text in COMMANDS:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(call=call)
        if name != "methods":
            getattr(options, f"{name}_options")(sub)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 on success, 1 if a check failed, 2 on a user's mistake, 130 if interrupted."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every attempt to reach the hub
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # γ and β on a terminal that lacks them
    args = None
    try:
        args = _parser().parse_args(arguments)
        with _recipe(args), _repeatable(args):
            code = args.call(args) or 0
        sys.stdout.flush()
    except MetakeError as error:
        return _complain(f"error: {error}", 2)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = (
            f"{error.filename}: {error.strerror}; check the path, its permissions and the space left"
            if error.filename
            else error
        )
        return _complain(f"error: {where}", 2)
    except KeyboardInterrupt:
        goes_on = GO_ON.get(getattr(args, "command", ""), "")
        told = f"; the same command goes on after the last {goes_on}" if goes_on else ""
        return _complain(f"interrupted{told}", 130)
    return code


def _recipe(args: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """Whose recipe and which layers the command's model is given, for who asked for that."""
    like, layers = getattr(args, "recipe", None), getattr(args, "layers", None)
    if args.call in (_layers, _plan) or not (like or layers):
        return contextlib.nullcontext()
    from metake.experiments.borrowed import borrowed

    return borrowed(args.model, like, None if args.call is _stats else layers)  # statistics need no recipe


def _repeatable(args: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    if not getattr(args, "deterministic", False):
        return contextlib.nullcontext()
    from metake.experiments.repeatable import repeatable

    return repeatable()


def _complain(message: str, code: int) -> int:
    sys.stderr.write(f"metake: {' '.join(message.split())}\n")
    return code
