"""What every method promises on every model, asked of any method on any model.

A check is a function of a `Subject`: it returns in a few words what it found, and raises `BrokenPromise` with the
reason, or `NotAsked` where the promise does not apply. The model is bit-identical after each of them.
"""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from metake.algebra.update import Edit, EditRecord
from metake.editing.record import digest_of
from metake.experiments.subject import (
    BrokenPromise,
    Interrupted,
    NotAsked,
    Subject,
    expect,
    fingerprint,
    in_place_of,
    same,
)
from metake.language.tokens import in_context, locate
from metake.scoring.evaluation import read
from metake.support.errors import ParameterError, ProvenanceError, RequestError

CLOSE = {torch.float64: 1e-6, torch.float32: 1e-2}  # relative, of an update from other micro-batches; else 0.3
FEW = 64  # tokens of a micro-batch: a row or a few
MEASURED = {"seconds": {}, "peak_memory": 0}  # what of a record another run has otherwise


def located(s: Subject) -> str:
    """Each subject's tokens are found: what is read back up to the subject's last token ends in the subject."""
    for r in s.requests:
        found = locate(s.lm.tokenizer, in_context(r.frame, r.prompt), r.subject)
        told = s.lm.tokenizer.decode(found.ids[: found.lookup + 1])
        expect(told.rstrip().endswith(r.subject), f"up to the last token of {r.subject!r} one reads {told!r}")
    return f"subjects of {len(s.requests)} requests"


def untouched(s: Subject) -> str:
    """The model is bit-identical after an edit was computed, without hooks, gradients or parameters that want one."""
    s.edit  # noqa: B018
    s.expect_unchanged("after an edit was computed")
    modules = list(s.lm.model.modules())
    hooked = any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in modules)
    expect(not hooked, "a hook is left on the model")
    wanting = [n for n, p in s.lm.model.named_parameters() if p.requires_grad or p.grad is not None]
    expect(not wanting, f"gradients are left on: {', '.join(wanting[:3])}")
    return f"{len(s.before)} tensors"


def restored(s: Subject) -> str:
    """Applied, an edit changes the weights that it declares, by Δ rounded once; afterwards they are what they were."""
    lm, edit = s.lm, s.edit
    expect(edit.modules == s.editor.paths(lm) == tuple(edit.record.weights), "it edits other weights than it declares")
    kept, plain = {m: lm.weight(m).clone() for m in edit.modules}, s.logits()
    with edit.applied(lm):
        changed = {name for name, told in fingerprint(lm).items() if told != s.before[name]}
        expect(changed == {f"{m}.weight" for m in edit.modules}, f"it changed {sorted(changed)}")
        for u in edit.updates:
            total = kept[u.module].double() + u.delta.to(lm.device)
            exact = torch.equal(lm.weight(u.module), total.to(kept[u.module].dtype))
            expect(exact, f"{u.module} is not its weight plus Δ, rounded once")
        expect(not torch.equal(s.logits(), plain), "the edited model says to the last digit what it said before")
    s.expect_unchanged("after the edit was taken back")
    with contextlib.suppress(Interrupted), edit.applied(lm):
        raise Interrupted
    s.expect_unchanged("after an error inside `applied`")
    return ", ".join(edit.modules[:3])


def finite(s: Subject) -> str:
    """An update is finite and in double precision; thin, or dense throughout."""
    for u in s.edit.updates:
        d_out, d_in = s.lm.shape(u.module)
        expect(u.left.shape == (d_out, u.rank) and u.right.shape == (u.rank, d_in), f"{u.module}: factors do not fit")
        double = u.left.dtype == u.right.dtype == u.delta.dtype == torch.float64
        expect(double and u.delta.isfinite().all(), f"Δ of {u.module} is not finite, or not in double precision")
        expect(u.delta.any(), f"Δ of {u.module} is zero")
        expect(u.dense is None or (not u.rank and u.dense.shape == (d_out, d_in)), f"{u.module} is thin and dense")
    return ", ".join(f"rank {u.rank}" if u.dense is None else "dense" for u in s.edit.updates[:3])


def takes(s: Subject) -> str:
    """The targets are more probable after the edit than before."""
    pairs = [(r.text, r.target, r.seam) for r in s.requests]
    before = [found.log_p for found in read(s.lm, pairs)]
    with s.edit.applied(s.lm):
        found = read(s.lm, pairs)
    rise = [now.log_p - then for now, then in zip(found, before, strict=True)]
    said = sum(all(now.correct) for now in found)
    told = f"log p of the target {sum(rise) / len(rise):+.2f} on average; said first in {said} of {len(rise)}"
    expect(sum(rise) > 0, told)
    return told


def saved(s: Subject) -> str:
    """Saved and loaded an edit is the same, bit for bit, with its record."""
    with tempfile.TemporaryDirectory() as folder:
        again = Edit.load(s.edit.save(Path(folder) / "edit"))
    expect(same(again, s.edit), "its factors are others after saving and loading")
    expect(again.record == s.edit.record, "its record is another after saving and loading")
    return f"{sum(t.numel() for u in again.updates for t in (u.left, u.right)):,} numbers in the factors"


def adapter(s: Subject) -> str:
    """As a LoRA adapter, attached or merged, an edit gives the logits of the edited model."""
    try:
        from peft import PeftModel
    except ImportError:
        raise NotAsked("peft is not installed: pip install peft") from None
    edit, rank, told = s.edit, None, "exact"
    if any(u.dense is not None for u in edit.updates):
        rank = min(256, *(size for m in edit.modules for size in s.lm.shape(m)))
        edit, lost = s.edit.compress(rank)
        told = f"discards {max(lost.values()):.1e} of ‖Δ‖² at rank {rank}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "lora"
        if rank:
            with contextlib.suppress(ParameterError):
                s.edit.to_peft(folder)
                raise BrokenPromise("a dense edit became an adapter although no rank was given")
            expect(not folder.exists(), "a refused export left something behind")
        s.edit.to_peft(folder, rank)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # of missing or unexpected keys, of a wrong fan_in_fan_out
            adapted = PeftModel.from_pretrained(copy.deepcopy(s.lm.model), folder)
        record = json.loads((folder / "metake.json").read_text("utf-8"))["record"]
    expect(record == json.loads(edit.record.to_json()), "the adapter's record is not the edit's")
    before, attached = s.logits(), s.logits(adapted)
    with edit.applied(s.lm):
        expected = s.logits()
    close = 1e-10 if s.lm.dtype == torch.float64 else 1e-3 if s.lm.dtype == torch.float32 else 0.1
    for name, found in (("attached", attached), ("merged", s.logits(adapted.merge_and_unload()))):
        off = (found - expected).abs().max().item()
        expect(off <= close * (1 + expected.abs().max().item()), f"{name}, its logits are off by {off:.1e}")
    expect((expected - before).abs().max() > 0, "the edited model says to the last digit what it said before")
    s.expect_unchanged("after an export")
    return told


def deterministic(s: Subject) -> str:
    """An edit depends on its seed, not on the state of torch's own generator."""
    s.edit  # noqa: B018
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + 1)
        again = s.compute()
    expect(same(again, s.edit), "the same call gives another edit")
    records = [replace(edit.record, **MEASURED) for edit in (again, s.edit)]
    expect(records[0] == records[1], "the same call gives another record")
    return "the same twice, bit for bit"


def micro_batches(s: Subject) -> str:
    """How much fits into memory at once decides time, not the result."""
    with in_place_of(s.lm, room=lambda blocks, gradients: FEW):
        again = s.compute()
    off = max(
        ((a.delta - b.delta).norm() / b.delta.norm()).item()
        for a, b in zip(again.updates, s.edit.updates, strict=True)
    )
    said = f"Δ differs by {off:.1e} of its norm in micro-batches of {FEW} tokens"
    expect(off <= CLOSE.get(s.lm.dtype, 0.3), said)
    return said


def refused(s: Subject) -> str:
    """An edit is refused by a model with other weights, which stays as it is; applied twice it is another base too."""
    edit, lm, first = s.edit, s.lm, s.edit.modules[0]
    with lm.scratch(edit.modules):
        for change in (lambda: lm.write_weight(first, lm.weight(first) + 1), lambda: edit.apply(lm, check=False)):
            change()
            now = fingerprint(lm)
            with contextlib.suppress(ProvenanceError):
                edit.apply(lm)
                raise BrokenPromise(f"{first} was another, and the edit was applied")
            expect(fingerprint(lm) == now, "a refused edit changed the model")
    s.expect_unchanged("after a refused edit")
    return f"known by the SHA-256 of {len(edit.record.weights)} weights"


def nothing(s: Subject) -> str:
    """Zero requests give a zero update, and leave the state as it is."""
    state = s.editor.init(s.lm, s.statistics)
    edit, after = s.editor.step(s.lm, [], state)
    expect(edit.modules == s.editor.paths(s.lm), "zero requests edit other weights than those that it declares")
    expect(all(not u.rank and not u.delta.any() for u in edit.updates), "zero requests change something")
    expect(after is state, "zero requests change the state")
    expect(edit.record.weights and not edit.record.requests, "the record of zero requests is not complete")
    with edit.applied(s.lm):
        s.expect_unchanged("with an edit of zero requests applied")
    return "a zero update"


def interrupted(s: Subject) -> str:
    """Stopped in the middle, between two weights or by a request that cannot be edited, the model is what it was."""
    s.edit  # noqa: B018
    last = s.adds
    with contextlib.suppress(Interrupted), s.watched(last):
        s.compute()
    s.expect_unchanged("after an interruption")
    rival = replace(s.requests[0], id="rival", target=f"{s.requests[0].target} and more")
    with contextlib.suppress(RequestError):
        s.compute([*s.requests, rival])
        raise BrokenPromise("two requests that contradict each other were edited")
    s.expect_unchanged("after a batch that was refused")
    return f"at the last of {last} additions to weights"


def told(s: Subject) -> str:
    """The record says where the edit came from."""
    record, may_be_empty = s.edit.record, {"refinement", "seed"}
    if not getattr(s.statistics, "digest", ""):  # put together by hand
        may_be_empty.add("statistics_digest")
    empty = [f.name for f in fields(EditRecord) if not getattr(record, f.name) and f.name not in may_be_empty]
    expect(not empty, f"the record does not say: {', '.join(empty)}")
    expect(record.requests == tuple(r.id for r in s.requests), "the record names other requests")
    expect(record.requests_digest == digest_of(s.requests), "the record's digest is of other requests")
    weights = {m: s.lm.digest(m) for m in s.edit.modules}
    expect(record.weights == weights, "the record's SHA-256 of the weights before are not theirs")
    plain = asdict(record)
    expect(json.loads(json.dumps(plain["recipe"])) == plain["recipe"], "the recipe is not plain data")
    return f"{len(fields(EditRecord)) - len(empty)} entries"


CHECKS: dict[str, Callable[[Subject], str]] = {
    "tokens located": located,
    "model untouched": untouched,
    "exactly restored": restored,
    "finite update": finite,
    "edit takes": takes,
    "saved = loaded": saved,
    "adapter = merged": adapter,
    "deterministic": deterministic,
    "batch = micro-batch": micro_batches,
    "other base refused": refused,
    "zero requests": nothing,
    "interrupted": interrupted,
    "record": told,
}
"""Every promise by its name; the docstring of its function says what is asked."""
