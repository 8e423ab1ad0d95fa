"""A whole run on disk: sequential batches of edits, resumable after each, and the evaluation of every case.

config.json           what was asked for; a folder of another configuration is refused
batches/0000/         the edit of a batch (`Edit.save`) and the keys that the next batches must remember
finish/               what the method does once all batches are applied, if anything (`Editor.finish`)
before.jsonl          one line per case, evaluated before the first edit
cases.jsonl           one line per case, evaluated after the last batch
summary.json          metrics before and after, seconds, peak memory, digests
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from metake import methods
from metake.algebra.geometry import KeyStatistics
from metake.algebra.update import Edit, EditRecord
from metake.data.requests import Cases, EditCase, EditRequest, batches
from metake.editing.editor import Editor
from metake.editing.gradient.editor import GradientEditor
from metake.editing.record import digest_of
from metake.editing.state import EditorState
from metake.editing.targets import Targets, optimize_targets
from metake.experiments.borrowed import borrowed, borrowing
from metake.experiments.cases import PARTS, part_of, read_cases, select
from metake.experiments.former import same_statistics, statistics_of
from metake.experiments.made import of_model
from metake.experiments.parameters import require_kinds
from metake.experiments.processes import divided, first, place, planned_together
from metake.experiments.saved import SavedEdits, save_batch
from metake.language.chat import chat
from metake.language.model import LanguageModel, load
from metake.scoring.evaluation import CaseScore, Evaluation, evaluate, require_prompts
from metake.support.errors import ParameterError, ProvenanceError, near_misses
from metake.support.machine import peak_memory, versions
from metake.support.progress import progress
from metake.support.storage import contents, held, load_tensors, read_json, reading, write_file

log = logging.getLogger("metake")


@dataclass(frozen=True)
class RunConfig:
    """What a run does. `data`: as `read_cases` takes it; `text`: of the key statistics."""

    model: str = "tiny"
    method: str = "metake"
    data: str = "facts"
    edits: int = 100
    batch: int = 20
    seed: int = 0
    text: str = "embedded"
    text_tokens: int | None = None
    dtype: str | None = None
    generate: bool = False
    changes: dict[str, Any] = field(default_factory=dict)  # parts of the editor to replace
    part: str = "all"  # of the data's subjects: see `part_of`
    recipe: str | None = None  # of another model, and the edited layers: see `experiments.borrowed`
    layers: list[int] | None = None
    chat: bool = False  # ask by the tokenizer's chat template

    def __post_init__(self) -> None:
        require_kinds(self, text_tokens=(int,), dtype=(str,), recipe=(str,), layers=(list, tuple))
        if not (self.recipe or self.layers):
            for name, own in borrowing(self.model).items():
                object.__setattr__(self, name, own)
        if self.part not in PARTS:
            raise ParameterError(near_misses(self.part, PARTS, "part of the subjects"))
        for name in ("edits", "batch"):
            if getattr(self, name) < 1:
                raise ParameterError(f"{name} must be at least 1; found {getattr(self, name)}")

    def editor(self) -> Editor | GradientEditor:
        """The editor of this run."""
        with borrowed(self.model, self.recipe, self.layers):
            return methods.method(self.method, self.model, seed=self.seed, **self.changes)


def cases_of(config: RunConfig, lm: LanguageModel) -> Cases:
    """The cases of a run, in the order of its edits."""
    cases = part_of(read_cases(config.data), config.part)
    return select(lm, chat(lm, cases) if config.chat else cases, config.edits, config.seed)


def edit_sequence(
    lm: LanguageModel, editor: Editor, requests: Sequence[EditRequest], given: Mapping[int, KeyStatistics], size: int,
    folder: Path | None = None, shared: Unedited | None = None
) -> Iterator[tuple[Edit, EditorState]]:
    """Edit in consecutive batches, each applied to `lm` before the next is computed; yields after each application.

    folder: keeps every batch's edit, which another call with the same words reads instead; shared: as `run` has it.
    """
    state = editor.init(lm, given)
    for number, batch in enumerate(batches(requests, size)):
        edit, state = _batch(lm, editor, batch, state, folder and folder / f"{number:04d}", None if number else shared)
        yield edit, state


@dataclass
class Unedited:
    """What runs that start from the same model on the same cases need not do again: filled by the first, read by the
    others.
    before: the evaluation of the unedited model; plans: Stage I of the first batch, by `Editor.plan_key`.
    """

    before: Evaluation | None = None
    plans: dict[Any, Targets] = field(default_factory=dict)

    def plan(
        self, lm: LanguageModel, editor: Editor, state: EditorState, requests: Sequence[EditRequest]
    ) -> Targets | None:
        """Stage I of an editor's first batch, None if it plans in pieces. `lm` must be unedited."""
        if (key := editor.plan_key(state)) is not None and key not in self.plans:
            self.plans[key] = optimize_targets(lm, requests, state.contexts, editor.layers[-1], editor.target)
        return self.plans.get(key)


def run(config: RunConfig, out: str | Path, device: str | None = None, shared: Unedited | None = None) -> Evaluation:
    """Carry out a run in folder `out`, going on where an earlier call with the same configuration stopped.

    shared: what runs of the same model, data, edits, batch and seed share; the seconds of their batches then exclude
    the first batch's Stage I.
    Returns the evaluation of all edited cases after the last batch. Raises ParameterError if `out` holds anything else.
    """
    out = Path(out)
    editor = config.editor()
    with contextlib.ExitStack() as alone:
        first(lambda: alone.enter_context(held(out, wait=False)))
        resumes = first(lambda: holds(out, config))
        lm = load(config.model, config.dtype, device)
        cases = cases_of(config, lm)
        if config.generate:
            require_prompts(cases)
        begun = out / "batches" / "0000"
        recorded = EditRecord.load(begun).statistics_digest if resumes and begun.is_dir() else ""
        read = config.text, editor.layers, config.text_tokens
        state = editor.init(lm, statistics_of(lm, *read, recorded))
        state = replace(state, contexts=first(lambda: state.contexts))  # another GPU might draw others
        if recorded and same_statistics(lm, recorded, state.statistics_digest, *read):
            state = replace(state, statistics_digest=recorded)
        out.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        original = shared.before if shared and shared.before else _evaluated(lm, cases, config)
        if shared:
            shared.before = original
        if not resumes:  # claimed only now: a setting that cannot be carried out leaves nothing behind
            told = json.dumps(asdict(config), indent=1, sort_keys=True) + "\n"
            first(lambda: write_file(out / "config.json", told))
        with lm.scratch(editor.paths(lm)):
            records = _resume(lm, editor, cases, state, config.batch, out, shared)
            opening = next(records)
            spent, peak = Counter(opening.seconds), opening.peak_memory
            for record in records:
                spent.update(record.seconds)
                peak = max(peak, record.peak_memory)
            result = _evaluated(lm, cases, config, original)
        seconds = {"total": time.perf_counter() - started, **spent}
        origin = of_model(lm, {"data": config.data}, config.text, config.text_tokens)
        made = config, cases, original, result, opening, seconds, max(peak, peak_memory(lm.device)), origin
        first(lambda: _report(out, *made))
        return result


def _evaluated(lm: LanguageModel, cases: Cases, config: RunConfig, before: Evaluation | None = None) -> Evaluation:
    """`evaluate`, of which several processes do a part each: what a case writes does not depend on the others."""

    def score(mine: Sequence[EditCase]) -> tuple[CaseScore, ...]:
        writes = config.generate and any(p.kind == "generation" for c in mine for p in c.probes)
        return evaluate(lm, mine, writes, seed=config.seed).cases

    return Evaluation(tuple(divided(list(cases), score)), before)


def holds(out: Path, config: RunConfig) -> bool:
    """Whether a folder holds the run of this configuration. Raises ParameterError if it holds anything else."""
    if (out / "config.json").is_file():
        found, wanted = _read_config(out), json.loads(json.dumps(asdict(config)))
        if changed := sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k)):
            raise ParameterError(
                f"{out} holds a run with another {', '.join(changed)}; choose another folder, or repeat that "
                "run's settings to resume it"
            )
        return True
    if out.exists() and (not out.is_dir() or contents(out)):
        raise ParameterError(f"{out} is not empty and holds no run; choose another folder")
    return False


def _read_config(out: Path) -> dict[str, Any]:
    """The settings in a run's folder. Raises ProvenanceError if the file is damaged."""
    with reading(out / "config.json", "of another version", "choose another folder, or remove this one"):
        try:
            return asdict(RunConfig(**read_json(out / "config.json")))
        except ParameterError as error:  # which does not name the file
            raise ValueError(error) from error


def _resume(
    lm: LanguageModel, editor: Editor, cases: Cases, state: EditorState, size: int, out: Path, shared: Unedited | None
) -> Iterator[EditRecord]:
    """Apply the batches already on disk, compute and save the rest; the model is left edited.

    Yields each edit's record. The edit itself is let go: a dense one is as large as the weights it changes.
    """
    for number, batch in enumerate(progress(list(batches([r for c in cases for r in c.requests], size)), "batches")):
        folder = out / "batches" / f"{number:04d}"
        edit, state = _batch(lm, editor, batch, state, folder, None if number else shared)
        record = edit.record
        del edit
        yield record
    if last := editor.finish(lm, state):
        first(lambda: last.save(out / "finish"))
        last.apply(lm)
        yield last.record


def _batch(
    lm: LanguageModel, editor: Editor, batch: list[EditRequest], state: EditorState, folder: Path | None,
    shared: Unedited | None = None
) -> tuple[Edit, EditorState]:
    """Apply the edit of one batch: the one in its folder, or else computed and saved there.

    Of several processes all take what the first has solved: their models stay the same to the bit.
    """
    if there := bool(folder and first(folder.is_dir)):
        edit, after = _load_batch(folder, batch, state, lm.device)
    else:
        planned = shared.plan(lm, editor, state, batch) if shared else planned_together(lm, editor, batch, state)
        edit, after = editor.step(lm, batch, state, planned=planned)
        if folder:
            first(lambda: save_batch(folder, edit, after.keys))
            if there := place()[1] > 1:
                edit, after = _load_batch(folder, batch, state, lm.device)
    edit.apply(lm, check=there)  # else it was made on this very model
    return edit, after


def _load_batch(folder: Path, batch: list[EditRequest], state: EditorState, device: Any) -> tuple[Edit, EditorState]:
    """A batch's edit and the state after it, from disk. Raises ProvenanceError if damaged or of other requests."""
    edit = Edit.load(folder, device)
    for what, found, expected in (
        ("requests", edit.record.requests_digest, digest_of(batch)),
        ("key statistics", edit.record.statistics_digest, state.statistics_digest),
    ):
        if found != expected:
            told = f"{folder} holds the edit of other {what} than this run's"
            raise ProvenanceError(f"{told}; the data, text or model has changed: choose another folder")
    with reading(folder, "of another run", "remove it to compute it again"):
        keys = {int(k): t.to(device) for k, t in load_tensors(folder / "keys.safetensors")[0].items()}
        return edit, replace(state.after(edit, keys, len(batch)), contexts=edit.record.context_templates)


def _report(
    out: Path, config: RunConfig, cases: Cases, before: Evaluation, after: Evaluation, opening: EditRecord,
    seconds: dict, peak: int, origin: dict
) -> None:
    for name, evaluation in (("before.jsonl", before), ("cases.jsonl", after)):
        write_file(out / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in evaluation.records()))
    summary = {
        "before": before.metrics, "after": after.metrics, "cases": len(cases), "skipped": cases.skipped,
        "seconds": seconds, "peak_memory_bytes": peak,
        "data": {"source": Path(cases.source).name, "digest": cases.digest},
        "statistics_digest": opening.statistics_digest,
        "base": opening.base, "recipe": opening.recipe, "context_templates": opening.context_templates,
        "versions": versions(), "config": asdict(config), "provenance": origin,
    }  # fmt: skip
    write_file(out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


def open_run(folder: str | Path) -> tuple[RunConfig, SavedEdits]:
    """Configuration and edits of a run's folder, in order. Raises ParameterError if it is none or has no batch yet."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ParameterError(f"{folder} holds no run (no config.json); make one with: metake run --out {folder}")
    config = RunConfig(**_read_config(folder))
    edits = SavedEdits((*sorted((folder / "batches").glob("[0-9]*")), *folder.glob("finish")))
    if not edits:
        go_on = f"metake run --out {folder} and the same settings"
        raise ParameterError(f"{folder} has no finished batch yet; go on with: {go_on}")
    return config, edits


def reevaluate(folder: str | Path, device: str | None = None, chat: bool = False) -> Evaluation:
    """Evaluate a finished run again, from its saved edits on a freshly loaded base.

    chat: ask by the tokenizer's chat template also what was edited without it.
    """
    config, lm, cases, edits = reopened(folder, device, chat)
    original = evaluate(lm, cases, config.generate, seed=config.seed)
    with lm.scratch(edits[0].modules):
        for edit in edits:
            edit.apply(lm)
        return evaluate(lm, cases, config.generate, original, config.seed)


def reopened(
    folder: str | Path, device: str | None = None, chat: bool = False
) -> tuple[RunConfig, LanguageModel, Cases, SavedEdits]:
    """A run to be asked again: its settings, its unedited model, the cases of which all is edited, and the edits."""
    config, edits = open_run(folder)
    lm = load(config.model, config.dtype, device)
    cases = cases_of(replace(config, chat=chat or config.chat), lm)
    done = [id for record in edits.records() for id in record.requests]
    if done != [r.id for c in cases for r in c.requests][: len(done)]:
        raise ProvenanceError(f"{folder} holds edits of other cases than {config.data} gives now: the data has changed")
    whole = [c for c in cases if {r.id for r in c.requests} <= {*done}]
    return config, lm, Cases(whole, *vars(cases).values()), replace(edits, device=lm.device)
