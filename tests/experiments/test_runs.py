"""A run on disk is the same as one in memory, whatever interrupts it; and it never takes a folder for what it is
not.
"""

import gc
import json
import math
import re
import shutil
import weakref
from dataclasses import asdict, replace

import pytest
import reference
import torch
from models import random_model
from same import contents, fingerprint

import metake as mk
from metake.algebra.geometry import inverse_covariance
from metake.algebra.update import Edit, total
from metake.data.facts import facts_records
from metake.data.requests import Cases, EditCase, EditRequest, Probe, check_batch
from metake.editing.editor import Editor
from metake.experiments import former, runs
from metake.experiments.cases import read_cases, select
from metake.experiments.runs import RunConfig, edit_sequence, open_run, reevaluate, run
from metake.methods import method
from metake.support.errors import MetakeError, ParameterError, ProvenanceError, RequestError

# five columns: the update's last digit then depends on how the gate lies in memory, which saving changes
CONFIG = RunConfig(method="alphaedit", edits=11, batch=5, seed=5, text_tokens=3000)


def base(*_):
    """What `load` is replaced by: a fresh random model that goes by the recipe of `tiny`."""
    lm = random_model("gpt2")
    lm.name = "tiny"
    return lm


@pytest.fixture(autouse=True)
def _random_base(monkeypatch):
    monkeypatch.setattr(runs, "load", base)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, session_cache):
    """An uninterrupted run of three batches: its folder and its result. Not to be written to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAKE_CACHE", str(session_cache))
        patch.setattr(runs, "load", base)
        return folder, run(CONFIG, folder)


SMALL = replace(CONFIG, method="memit_seq", edits=2, batch=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory, session_cache):
    folder = tmp_path_factory.mktemp("small") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAKE_CACHE", str(session_cache))
        patch.setattr(runs, "load", base)
        run(SMALL, folder)
    return folder


@pytest.fixture
def copied(small, tmp_path):
    """A copy of a finished run of two batches, to be damaged."""
    return shutil.copytree(small, tmp_path / "copy")


def tensors(edit):
    return [t for u in edit.updates for t in (u.left, u.right)]


def identical(one, other):
    return len(tensors(one)) == len(tensors(other)) and all(map(torch.equal, tensors(one), tensors(other)))


def lines(file):
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def raise_at(monkeypatch, call, error):
    """Let the editor's step raise at its `call`-th call; returns the list of the batches it was called with."""
    asked, step = [], Editor.step

    def failing(self, lm, requests, state, **given):
        asked.append([r.id for r in requests])
        if len(asked) == call:
            raise error
        return step(self, lm, requests, state, **given)

    monkeypatch.setattr(Editor, "step", failing)
    return asked


# The same as by hand


def test_run_equals_the_same_done_by_hand(finished):
    folder, result = finished
    lm = base()
    editor = mk.methods.alphaedit("tiny", seed=5)
    cases = select(lm, mk.facts(), 11, 5)
    state = editor.init(lm, mk.statistics(lm, layers=editor.layers, tokens=3000))
    fresh, before, edits = state, mk.evaluate(lm, cases, seed=5), []
    for batch in (cases[:5], cases[5:10], cases[10:]):
        edit, state = editor.step(lm, [c.request for c in batch], state)
        if len(edits) == 1:
            assert not identical(edit, editor.step(lm, [c.request for c in batch], fresh)[0]), (
                "nothing to remember: the test is too easy"
            )
        edit.apply(lm)
        edits.append(edit)
    saved = open_run(folder)[1]
    assert len(saved) == 3 and all(map(identical, saved, edits))
    assert [len(e.record.requests) for e in saved] == [5, 5, 1]
    expected = mk.evaluate(lm, cases, before=before, seed=5)
    assert result.records() == expected.records() and result.metrics == expected.metrics
    assert result.before.records() == before.records()
    assert expected.metrics != before.metrics, "the edits changed nothing that is measured"


def test_sequence_in_memory_equals_the_run(finished):
    lm = base()
    editor = mk.methods.alphaedit("tiny", seed=5)
    requests = [c.request for c in select(lm, mk.facts(), 11, 5)]
    found = list(edit_sequence(lm, editor, requests, mk.statistics(lm, layers=editor.layers, tokens=3000), 5))
    assert all(identical(edit, saved) for (edit, _), saved in zip(found, open_run(finished[0])[1], strict=True))
    assert [state.edits for _, state in found] == [5, 10, 11]


def test_a_sequence_in_a_folder_makes_no_batch_twice(monkeypatch, tmp_path):
    lm = base()
    editor = mk.methods.memit_seq("tiny", seed=5)
    requests = [c.request for c in select(lm, mk.facts(), 3, 5)]
    given = mk.statistics(lm, layers=editor.layers, tokens=3000)
    asked = raise_at(monkeypatch, 3, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        list(edit_sequence(base(), editor, requests, given, 1, tmp_path))
    assert len(list(edit_sequence(base(), editor, requests, given, 1, tmp_path))) == 3
    assert asked == [[r.id] for r in (*requests, requests[2])]


def test_folder_is_complete(finished):
    folder, result = finished
    assert sorted(p.name for p in folder.iterdir()) == [
        "batches", "before.jsonl", "cases.jsonl", "config.json", "summary.json"
    ]
    assert sorted(p.name for p in (folder / "batches").iterdir()) == ["0000", "0001", "0002"]
    assert lines(folder / "cases.jsonl") == result.records() and len(result.records()) == 11
    assert lines(folder / "before.jsonl") == result.before.records()
    assert [row["id"] for row in lines(folder / "cases.jsonl")] == [
        i for e in open_run(folder)[1] for i in e.record.requests
    ]
    assert json.loads((folder / "config.json").read_text()) == asdict(CONFIG)
    summary = json.loads((folder / "summary.json").read_text())
    assert (
        summary["after"] == result.metrics
        and summary["before"] == result.before.metrics
        and "specificity_pre_edit" in summary["after"]
    )
    assert summary["cases"] == 11 and summary["config"] == asdict(CONFIG) and summary["skipped"] == {}
    assert summary["data"] == {"source": "facts", "digest": select(base(), mk.facts(), 11, 5).digest}
    assert {"total", "targets", "keys", "solve"} <= set(summary["seconds"]) and all(
        v > 0 for v in summary["seconds"].values()
    )
    assert summary["seconds"]["total"] > summary["seconds"]["targets"]
    assert summary["peak_memory_bytes"] > 1e6 and {"metake", "torch", "transformers", "python"} <= set(
        summary["versions"]
    )
    assert (
        summary["base"]["id"] == "tiny"
        and summary["recipe"]["part"] == "Editor"
        and summary["context_templates"][0] == "{}"
    )
    assert re.fullmatch("[0-9a-f]{64}", summary["statistics_digest"])


def test_reevaluation_equals_the_run(finished):
    folder, result = finished
    found = reevaluate(folder)
    assert found.records() == result.records() and found.metrics == result.metrics


def test_generation_is_part_of_a_run_if_asked_for(tmp_path):
    config = replace(CONFIG, method="memit", edits=1, batch=1, generate=True)
    rows = lines(tmp_path / "run" / "cases.jsonl") if run(config, tmp_path / "run") else []
    assert len(rows[0]["generations"]) == 10 and rows[0]["fluency"] > 0
    assert reevaluate(tmp_path / "run").records() == rows


# Interrupted


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_interrupted_and_resumed_equals_uninterrupted(finished, tmp_path, monkeypatch, error):
    folder, out = finished[0], tmp_path / "run"
    with monkeypatch.context() as patch:
        raise_at(patch, 2, error)
        with pytest.raises(type(error)):
            run(CONFIG, out)
    assert sorted(contents(out)) == [
        "batches/0000/edit.safetensors", "batches/0000/keys.safetensors", "batches/0000/record.json", "config.json"
    ]
    part = reevaluate(out)
    assert len(part.cases) == 5
    asked = raise_at(monkeypatch, 0, None)
    result = run(CONFIG, out)
    assert list(map(len, asked)) == [5, 1], "the finished batch was computed again, or one was left out"
    assert all(map(identical, open_run(out)[1], open_run(folder)[1]))
    for name in ("cases.jsonl", "before.jsonl", "config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert result.metrics == finished[1].metrics
    told = [json.loads((f / "summary.json").read_text()) for f in (out, folder)]
    one, other = ({k: v for k, v in t.items() if k not in ("seconds", "peak_memory_bytes")} for t in told)
    assert one == other


def test_finished_run_computes_no_batch_again(copied, monkeypatch):
    before = contents(copied / "batches")
    asked = raise_at(monkeypatch, 1, AssertionError("a step was taken"))
    run(SMALL, copied)
    assert not asked and contents(copied / "batches") == before


@pytest.mark.parametrize("fails", [False, True], ids=["finished", "failed"])
def test_model_is_restored(tmp_path, monkeypatch, fails):
    lm = base()
    before = fingerprint(lm.model)
    monkeypatch.setattr(runs, "load", lambda *_: lm)
    config = replace(CONFIG, method="memit", edits=3, batch=1)
    if fails:
        raise_at(monkeypatch, 3, RuntimeError("at the third batch"))
        with pytest.raises(RuntimeError, match="third"):
            run(config, tmp_path / "run")
    else:
        run(config, tmp_path / "run")
        reevaluate(tmp_path / "run")
    assert len(open_run(tmp_path / "run")[1]) >= 2
    assert fingerprint(lm.model) == before


# What is held


def alive(updates):
    gc.collect()
    return sum(u() is not None for u in updates)


def test_no_edit_is_kept_once_it_is_applied(tmp_path, monkeypatch):
    """RECT's updates are as large as the weights they change. With `memit` no state holds on to any of them either."""
    config, made, held = replace(CONFIG, method="memit", edits=3, batch=1), [], []
    step, load, apply = Editor.step, Edit.load.__func__, Edit.apply

    def watch(edit):
        made.extend(map(weakref.ref, edit.updates))
        return edit

    def stepping(self, *given, **more):
        held.append(alive(made))
        edit, state = step(self, *given, **more)
        return watch(edit), state

    def applying(self, lm, check=True):
        held.append(alive(made) - len(self.updates))
        apply(self, lm, check)

    def evaluating(*given, **more):
        held.append(alive(made))
        return mk.evaluate(*given, **more)

    monkeypatch.setattr(Editor, "step", stepping)
    monkeypatch.setattr(Edit, "apply", applying)
    monkeypatch.setattr(Edit, "load", classmethod(lambda cls, *given: watch(load(cls, *given))))
    monkeypatch.setattr(runs, "evaluate", evaluating)
    run(config, tmp_path / "run")
    size = len(made) // 3
    assert len(made) == 3 * size > 0 and len(held) == 3 + 3 + 2 and max(held) == 0, "computed"
    shutil.rmtree(tmp_path / "run" / "batches" / "0002")
    run(config, tmp_path / "run")
    assert len(made) == 6 * size and len(held) == 8 + 1 + 3 + 2 and max(held) == 0, "resumed"
    reevaluate(tmp_path / "run")
    assert len(held) == 14 + 3 + 2 and max(held) <= size, "at most the one before"


def test_seconds_are_those_of_all_batches(finished):
    folder, _ = finished
    told = json.loads((folder / "summary.json").read_text())["seconds"]
    assert {k: v for k, v in told.items() if k != "total"} == total(open_run(folder)[1]).record.seconds


def test_saved_edits_are_a_sequence(finished):
    edits = open_run(finished[0])[1]
    assert len(edits) == 3 and identical(edits[-1], edits[2]) and not identical(edits[0], edits[1])
    assert [r.to_json() for r in edits.records()] == [e.record.to_json() for e in edits]


def test_a_batch_is_loaded_where_the_model_is(small):
    """Tensors of the device `meta` have no content, so that one is on any machine."""
    lm, editor = base(), mk.methods.memit("tiny", seed=5)
    cases = select(lm, mk.facts(), 1, 5)
    state = replace(
        editor.init(lm, mk.statistics(lm, layers=editor.layers, tokens=3000)),
        statistics_digest=open_run(small)[1][0].record.statistics_digest, metrics={}
    )
    edit, _ = runs._load_batch(small / "batches" / "0000", [c.request for c in cases], state, "meta")
    assert {t.device.type for t in tensors(edit)} == {"meta"}
    assert {t.device.type for e in replace(open_run(small)[1], device="meta") for t in tensors(e)} == {"meta"}


# A method that has something left to do at the end


PRUNE = replace(CONFIG, method="prune", edits=6, batch=2)


def strong(*words, **changes):
    """`prune` with updates that are large beside a random model's weights, so that there is something to cap."""
    editor = method(*words, **changes)
    return replace(
        editor, metric=inverse_covariance(0.05),
        target=replace(editor.target, steps=5, step_size=4.0, clamp=30.0, stop_below=0.0)
    )


@pytest.fixture
def _strong(monkeypatch):
    monkeypatch.setattr(runs.methods, "method", strong)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, session_cache):
    folder = tmp_path_factory.mktemp("pruned") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAKE_CACHE", str(session_cache))
        patch.setattr(runs, "load", base)
        patch.setattr(runs.methods, "method", strong)
        return folder, run(PRUNE, folder)


def edited(folder):
    """The model with a run's edits applied one after the other."""
    lm = base()
    for edit in open_run(folder)[1]:
        edit.apply(lm)
    return lm


def test_what_is_done_at_the_end_is_part_of_a_run(pruned, _strong):
    folder, result = pruned
    assert sorted(p.name for p in folder.iterdir()) == [
        "batches", "before.jsonl", "cases.jsonl", "config.json", "finish", "summary.json"
    ]
    edits = open_run(folder)[1]
    assert [len(e.record.requests) for e in edits] == [2, 2, 2, 0] and edits[-1].updates[0].delta.any()
    lm, first = base(), base()
    editor = strong("prune", "tiny", seed=5)
    requests = [c.request for c in select(lm, mk.facts(), 6, 5)]
    # noqa: B007 (the last one)
    for _edit, state in edit_sequence(lm, editor, requests, mk.statistics(lm, layers=editor.layers, tokens=3000), 2):
        pass
    whole = {path: reference.prune(lm.weight(path), first.weight(path)) for path in edits[0].modules}
    assert all((whole[path] - lm.weight(path)).norm() > 0.1 * lm.weight(path).norm() for path in whole), (
        "nothing was capped"
    )
    editor.finish(lm, state).apply(lm)
    assert fingerprint(edited(folder).model) == fingerprint(lm.model)
    for path, weight in whole.items():
        torch.testing.assert_close(lm.weight(path), weight, rtol=1e-9, atol=1e-9)
    assert result.records() == mk.evaluate(lm, select(lm, mk.facts(), 6, 5), before=result.before, seed=5).records()
    assert reevaluate(folder).records() == result.records()


def test_a_sequence_with_an_end_interrupted_and_resumed_equals_uninterrupted(pruned, tmp_path, monkeypatch, _strong):
    folder, out = pruned[0], tmp_path / "run"
    with monkeypatch.context() as patch:
        raise_at(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(PRUNE, out)
    assert not (out / "finish").exists() and len(open_run(out)[1]) == 1 and len(reevaluate(out).cases) == 2
    asked = raise_at(monkeypatch, 0, None)
    result = run(PRUNE, out)
    assert list(map(len, asked)) == [2, 2], "the state of the finished batch was lost, or computed again"
    assert (
        result.records() == pruned[1].records()
        and (out / "cases.jsonl").read_bytes() == (folder / "cases.jsonl").read_bytes()
    )
    assert all(map(identical, open_run(out)[1], open_run(folder)[1]))
    assert fingerprint(edited(out).model) == fingerprint(edited(folder).model)


def test_an_end_is_saved_whole_or_not_at_all(pruned, tmp_path, monkeypatch, _strong):
    out, save = tmp_path / "run", Edit.save

    def failing(self, folder):
        if folder.name == "finish":
            save(self, folder.with_name(".finish.0123456789ab.partial"))  # as a power cut leaves it
            raise OSError(28, "No space left on device")
        return save(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Edit, "save", failing)
        with pytest.raises(OSError, match="No space"):
            run(PRUNE, out)
    assert sorted(p.name for p in out.iterdir()) == [".finish.0123456789ab.partial", "batches", "config.json"]
    assert len(open_run(out)[1]) == 3, "what was half written was read"
    undone = reevaluate(out)
    asked = raise_at(monkeypatch, 1, AssertionError("a step was taken"))
    assert run(PRUNE, out).records() == pruned[1].records() and not asked
    assert len(open_run(out)[1]) == 4 and reevaluate(out).records() == pruned[1].records() != undone.records()
    before = contents(out / "finish")
    run(PRUNE, out)
    assert contents(out / "finish") == before


@pytest.mark.parametrize("name", ["edit.safetensors", "record.json"])
def test_a_damaged_end_is_refused_where_it_is_read_and_made_again_by_the_run(pruned, tmp_path, name, _strong):
    folder = shutil.copytree(pruned[0], tmp_path / "copy")
    cut(folder / "finish" / name)
    for use in (lambda f: total(open_run(f)[1]), reevaluate):
        with pytest.raises(ProvenanceError, match="finish"):
            use(folder)
    run(PRUNE, folder)
    assert contents(folder / "finish") == contents(pruned[0] / "finish")


def test_an_end_is_exported_with_the_batches(pruned, tmp_path):
    """One edit of the base that gives the pruned weights; as an adapter of the change's own rank it loses nothing."""
    edit, lm = total(open_run(pruned[0])[1]), base()
    with edit.applied(lm):
        for path in edit.modules:
            torch.testing.assert_close(lm.weight(path), edited(pruned[0]).weight(path), rtol=1e-12, atol=1e-12)
    assert list(edit.record.requests) == [row["id"] for row in pruned[1].records()]
    assert (
        max(edit.to_peft(tmp_path / "lora", rank=6).values())
        < 1e-20
        < 1e-6
        < max(edit.to_peft(tmp_path / "thin", rank=5).values())
    )


def test_runs_that_share_what_the_unedited_model_gives_are_the_same_runs(tmp_path, monkeypatch):
    """Two methods that plan alike share Stage I of the first batch, and all share the evaluation before."""
    shared, made = runs.Unedited(), []
    optimize = runs.optimize_targets
    monkeypatch.setattr(runs, "optimize_targets", lambda *given: made.append(1) or optimize(*given))
    for name in ("memit_seq", "alphaedit", "blue"):
        config = replace(CONFIG, method=name, edits=2, batch=1)
        run(config, tmp_path / name, shared=shared)
        before = shared.before
        run(config, tmp_path / f"{name} alone")
        assert all(map(identical, open_run(tmp_path / name)[1], open_run(tmp_path / f"{name} alone")[1]))
        assert (tmp_path / name / "cases.jsonl").read_bytes() == (
            tmp_path / f"{name} alone" / "cases.jsonl"
        ).read_bytes()
    assert shared.before is before and len(shared.plans) == len(made) == 1, (
        "one plan for the two that share it; none for targets of each layer's own"
    )
    alone = json.loads((tmp_path / "alphaedit alone" / "summary.json").read_text())["seconds"]["targets"]
    assert alone > json.loads((tmp_path / "alphaedit" / "summary.json").read_text())["seconds"]["targets"], (
        "a run of its own counts all of its Stage I"
    )


# Folders that are something else


@pytest.mark.parametrize(
    "change",
    [
        {"edits": 3}, {"batch": 2}, {"seed": 6}, {"method": "alphaedit"}, {"data": "facts-zsre"}, {"text_tokens": 2999},
        {"generate": True}, {"changes": {"noise": 0.5}}, {"dtype": "float32", "model": "smollm2-135m"}
    ],
    ids=lambda change: "+".join(change),
)
def test_folder_of_another_configuration_is_refused(copied, change, monkeypatch):
    monkeypatch.setattr(runs, "load", lambda *_: pytest.fail("a model was loaded before the folder was looked at"))
    before = contents(copied)
    with pytest.raises(ParameterError, match=f"another {', '.join(sorted(change))};"):
        run(replace(SMALL, **change), copied)
    assert contents(copied) == before


def test_folder_with_foreign_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ParameterError, match="not empty and holds no run"):
        run(CONFIG, tmp_path)
    with pytest.raises(ParameterError, match="holds no run"):
        run(CONFIG, tmp_path / "thesis.tex")
    with pytest.raises(ParameterError, match="holds no run"):
        open_run(tmp_path)
    assert contents(tmp_path) == {"thesis.tex": b"mine"}


@pytest.mark.parametrize(
    "change",
    [
        {"method": "mettake"}, {"model": "tny"}, {"data": "fcats"}, {"edits": 10_000}, {"text": "nowhere.txt"},
        {"changes": {"colour": 1}}
    ],
    ids=lambda change: next(iter(change)),
)
def test_setting_that_cannot_be_carried_out_leaves_nothing_behind(tmp_path, change):
    with pytest.raises(ParameterError):
        run(replace(CONFIG, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_setting_refused_late_does_not_claim_the_folder(tmp_path):
    """Generation is refused when the cases are evaluated; the corrected command may use the same folder."""
    wrong = replace(CONFIG, method="memit", data="facts-zsre", edits=1, batch=1, generate=True)
    with pytest.raises(ParameterError, match="generation prompts"):
        run(wrong, tmp_path / "run")
    assert not contents(tmp_path)
    assert len(run(replace(wrong, generate=False), tmp_path / "run").cases) == 1


@pytest.mark.parametrize("name", ["edits", "batch"])
@pytest.mark.parametrize("value", [0, -3])
def test_counts_are_at_least_one(name, value):
    with pytest.raises(ParameterError, match=f"{name} must be at least 1; found {value}"):
        RunConfig(**{name: value})


@pytest.mark.parametrize("name, value", [
    ("edits", "20"), ("seed", None), ("changes", [1]), ("layers", "3"), ("data", 7), ("text_tokens", 0.5)
])
def test_a_setting_of_another_type_is_refused(name, value):
    with pytest.raises(ParameterError, match=f"^{name} is {re.escape(repr(value))}; expected "):
        RunConfig(**{name: value})


# Damage


@pytest.mark.parametrize(
    "text", ["", '{"model": "ti', "[]", "7", '{"modell": "tiny"}', '{"edits": 0}', b"\xff\xfe".decode("latin1")]
)
def test_damaged_configuration_is_refused(copied, text):
    (copied / "config.json").write_text(text, encoding="latin1")
    before = contents(copied)
    for use in (lambda: run(SMALL, copied), lambda: reevaluate(copied), lambda: open_run(copied)):
        with pytest.raises(MetakeError, match="config.json"):
            use()
    assert contents(copied) == before


def test_run_without_a_finished_batch_cannot_be_evaluated(copied):
    shutil.rmtree(copied / "batches")
    with pytest.raises(ParameterError, match="no finished batch"):
        reevaluate(copied)


def cut(file):
    file.write_bytes(file.read_bytes()[:-200])


def flip(file):
    raw = bytearray(file.read_bytes())
    raw[-9] ^= 1
    file.write_bytes(raw)


def remove(file):
    file.unlink()


def blank(file):
    file.write_text("{}")


@pytest.mark.parametrize(
    ("name", "damage"),
    [(f"{part}.safetensors", damage) for part in ("edit", "keys") for damage in (cut, flip, remove, blank)]
    + [("record.json", damage) for damage in (cut, remove, blank)],
)
def test_damaged_batch_is_refused(copied, name, damage, monkeypatch):
    damage(copied / "batches/0001" / name)
    lm, before = base(), contents(copied)
    weights = fingerprint(lm.model)
    monkeypatch.setattr(runs, "load", lambda *_: lm)
    raise_at(monkeypatch, 1, AssertionError("went on over a damaged batch"))
    with pytest.raises(ProvenanceError, match="0001"):
        run(SMALL, copied)
    assert contents(copied) == before and fingerprint(lm.model) == weights


def test_changed_data_and_text_are_noticed(tmp_path):
    """The folder's settings name files; their content may change between two calls."""
    records, text = facts_records()[:4], tmp_path / "text.txt"
    data, out = tmp_path / "data.json", tmp_path / "run"
    sentences = [
        f"{c.request.text} {c.request.target}, as everybody in the whole city knows." for c in mk.facts(limit=200)
    ]
    data.write_text(json.dumps(records))
    text.write_text("\n".join(sentences))
    config = replace(CONFIG, method="memit_seq", data=str(data), text=str(text), edits=4, batch=2)
    run(config, out)
    kept = contents(out)
    text.write_text("\n".join(sentences[:-1]))
    with pytest.raises(ProvenanceError, match="other key statistics"):
        run(config, out)
    text.write_text("\n".join(sentences))
    records[2]["requested_rewrite"]["target_new"]["str"] = "Atlantis"
    data.write_text(json.dumps(records))
    with pytest.raises(ProvenanceError, match="other requests"):
        run(config, out)
    data.write_text(json.dumps([record | {"case_id": 9 - record["case_id"]} for record in records]))
    with pytest.raises(ProvenanceError, match="other cases"):
        reevaluate(out)
    assert contents(out) == kept


# Which cases


def test_selection_depends_on_the_seed_alone():
    lm, cases = base(), mk.facts()
    chosen = [[c.request.id for c in select(lm, cases, 30, seed)] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and len(set(chosen[0])) == 30
    assert chosen[0] != sorted(chosen[0], key=int), "not drawn: the first ones"
    assert [c.request.id for c in select(lm, cases, 10, 0)] == chosen[0][:10], "more edits keep those of fewer"
    found = select(lm, cases, 30, 0)
    assert (found.format, found.source, found.skipped) == ("counterfact", "facts", {})
    assert set(found) <= set(cases)


def case(id, prompt, subject, target="Rome"):
    request = EditRequest(prompt, subject, target, id)
    return EditCase(request, (Probe("efficacy", request.text, target, "Paris"),))


def test_selection_passes_over_what_cannot_be_edited_and_counts_it():
    usable = [
        case("a", "The capital of {} is", "France"), case("b", "The capital of {} is", "Spain"),
        case("c", "Say {} is", "Spain")
    ]
    again = [case("d", "The capital of {} is", "France", "Berlin"), case("e", "The {} is", "capital of France")]
    torn = [case("f", "It is {}fore so", "There"), case("g", "They spoke {}ch", "Fren")]
    cases = Cases(usable + again + torn, "counterfact", "records", {"target equals truth": 4}, ("x",))
    lm = base()
    for seed in range(4):
        found = select(lm, cases, 3, seed)
        texts = [c.request.text for c in found]
        assert len(set(texts)) == 3 and not {"f", "g"} & {c.request.id for c in found}
    with pytest.raises(
        ParameterError,
        match=r"4 edits were asked for.*only 3 usable.*'second request about the same prompt and subject': 2",
    ) as told:
        select(lm, cases, 4, 0)
    assert "'subject ends inside a token': 2" in str(told.value) and "'target equals truth': 4" in str(told.value)
    whole = select(lm, Cases(usable + torn, skipped={"target equals truth": 4}), 3, 1)
    assert whole.skipped["target equals truth"] == 4 and whole.skipped.get("subject ends inside a token", 0) <= 2
    assert cases.skipped == {"target equals truth": 4}, "the caller's list was changed"


@pytest.mark.parametrize("edits", [620, 10**9])
def test_more_edits_than_cases_is_an_error(edits):
    with pytest.raises(ParameterError, match=f"{edits} edits were asked for, but the data has only 619 usable cases"):
        select(base(), mk.facts(), edits, 0)


def test_requests_of_a_run_never_meet_twice_in_a_batch(tmp_path):
    """Two subjects, one text: `check_batch` would refuse the batch in the middle of the run."""
    records = facts_records()[:2]
    other = json.loads(json.dumps(records[0]))
    prompt, subject = (records[0]["requested_rewrite"][k] for k in ("prompt", "subject"))
    word, _, rest = prompt.partition(" ")
    other["requested_rewrite"] |= {"prompt": "{} " + rest.replace("{}", subject), "subject": word}
    (tmp_path / "data.json").write_text(json.dumps([*records, other | {"case_id": 99}]))
    found = select(base(), read_cases(str(tmp_path / "data.json")), 2, 0)
    check_batch([c.request for c in found])
    with pytest.raises(ParameterError, match="second request"):
        select(base(), read_cases(str(tmp_path / "data.json")), 3, 0)


# Which file


ROME, MEND = facts_records()[:3], facts_records("zsre")[:3]
EASYEDIT = [
    {
        "case_id": i, "prompt": "The capital of France is", "target_new": "Rome", "subject": "France",
        "ground_truth": "Paris",
        "rephrase_prompt": "France is ruled from", "locality_prompt": "The capital of Spain is",
        "locality_ground_truth": "Madrid",
    }
    for i in range(2)
]  # fmt: skip


@pytest.mark.parametrize(
    ("records", "format", "count"), [(ROME, "counterfact", 3), (EASYEDIT, "counterfact", 2), (MEND, "zsre", 3)],
    ids=["rome", "easyedit", "mend"]
)
def test_format_is_told_from_the_records(tmp_path, records, format, count):
    file = tmp_path / "mystery.json"
    file.write_text(json.dumps(records))
    found = read_cases(str(file))
    assert (found.format, len(found), found.source) == (format, count, str(file))
    rivals = {p.rival for c in found for p in c.probes if p.kind == "efficacy"}
    assert (None in rivals) == (format == "zsre")


def test_embedded_sets_go_by_name():
    assert (
        read_cases("facts").digest
        == mk.facts().digest
        != read_cases("facts-zsre").digest
        == mk.facts(format="zsre").digest
    )


def test_other_files_are_refused_naming_the_first_wrong_field(tmp_path):
    def refusal(content):
        file = tmp_path / "data.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(RequestError) as told:
            read_cases(str(file))
        return str(told.value)

    assert "'prompt' missing" in refusal([{"question": "?"}])
    assert "'paraphrase_prompts' missing" in refusal([{k: v for k, v in ROME[0].items() if k != "paraphrase_prompts"}])
    assert "'loc' missing" in refusal([{k: v for k, v in MEND[0].items() if k != "loc"}]), (
        "a ZsRE file's flaw is named, not CounterFact's"
    )
    assert "'answers' is 'Rome'" in refusal([MEND[0] | {"answers": "Rome"}])
    assert "JSON list" in refusal("not json") and "JSON list" in refusal({"records": ROME})
    assert "at least one" in refusal([])


def test_missing_file_is_answered_with_the_near_name(tmp_path):
    with pytest.raises(
        ParameterError, match=r"unknown data set 'factz'. Did you mean 'facts'.*path of a CounterFact or ZsRE file"
    ):
        read_cases("factz")
    with pytest.raises(ParameterError, match="path of a CounterFact or ZsRE file"):
        read_cases(str(tmp_path))


def test_a_run_that_was_begun_while_all_of_a_text_was_read_by_default_goes_on_with_all_of_it(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    lines = [f"On day {i} the capital of country {i % 60} was moved, and {i} ships were sent." for i in range(2000)]
    text.write_text("\n".join(lines), encoding="utf-8")
    config, given = replace(SMALL, text=str(text), text_tokens=None), former.statistics
    with monkeypatch.context() as before:
        before.setattr(former, "statistics", lambda lm, text, layers, tokens: given(lm, text, layers, math.inf))
        run(config, tmp_path / "run")
    first, last = (json.loads((tmp_path / f"run/batches/000{i}/record.json").read_text()) for i in (0, 1))
    shutil.rmtree(tmp_path / "run" / "batches" / "0001")
    (tmp_path / "run" / "cases.jsonl").unlink()
    run(config, tmp_path / "run")
    again = json.loads((tmp_path / "run/batches/0001/record.json").read_text())
    assert again["statistics_digest"].startswith(first["statistics_digest"].partition("+")[0])
    assert again["statistics_digest"] == last["statistics_digest"]
    run(config, tmp_path / "fresh")
    fresh = json.loads((tmp_path / "fresh/batches/0000/record.json").read_text())
    assert fresh["statistics_digest"] != first["statistics_digest"], "what is begun now reads less"
