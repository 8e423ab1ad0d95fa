"""The bench times what it says, counts what a hand would count, and refuses what it cannot do. Small random models."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import reference
import torch
from models import random_model

import metake as mk
from metake import report
from metake.commands import cli
from metake.data.requests import EditRequest
from metake.editing.targets import TargetRule, optimize_targets
from metake.experiments.speed import bench as module
from metake.experiments.speed import literal, run_time, sizes
from metake.support.errors import ParameterError

QUICK = {"edits": 2, "steps": 2, "text_tokens": 3000}
FRANCE = EditRequest("The capital of {} is", "France", "a b", "0")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """The embedded model's place is taken by a random one that fits its recipe; products that measure the machine are
    short.
    """

    def base(*_):
        lm = random_model("gpt2")
        lm.name = "tiny"
        return lm

    monkeypatch.setattr(module, "load", base)
    monkeypatch.setattr(module, "matmul_rate", lambda lm, rate=module.matmul_rate: rate(lm, 0.001, 1024))


def by_stage(found):
    return {row["stage"]: row for row in found["stages"]}


@pytest.mark.parametrize("method", ["memit", "metake"])
def test_stages_are_timed_on_both_paths(method):
    found = module.bench("tiny", method, literal=1, rounds=2, **QUICK)
    stages = by_stage(found)
    refined = ["refinement"] * (method == "metake")
    assert list(stages) == ["targets", *refined, "keys", "solve", "write", "evaluation"]
    assert all(row["seconds"] > 0 for row in found["stages"])
    assert sum(row["seconds"] for name, row in stages.items() if name != "evaluation") <= 1.5 * found["total"], (
        "medians of two rounds"
    )
    for name in ("targets", *refined, "keys"):
        row = stages[name]
        assert (
            row["literal_seconds"] > 0
            and row["ratio"] == row["literal_seconds"] / row["seconds"]
            and row["seconds_per_edit"] == row["seconds"] / 2
        )
        assert row["literal_flops"] > row["flops"] > 0, "the accelerated path multiplies less"
    assert (
        stages["solve"]["literal_seconds"] > 0
        and stages["evaluation"]["literal_seconds"] > 0
        and stages["write"]["literal_seconds"] is None
    )
    one = found["stage_one"]
    assert (
        one["share"] == pytest.approx(one["flops"] / stages["targets"]["seconds"] / one["matmul_rate"])
        and 0 < one["share"] < 2
    )
    assert found["peak_memory"] > 2**20 and found["literal_requests"] == 1 and found["provenance"]["threads"] >= 1


def test_one_round_fits_into_its_total_and_counts_repeat_themselves():
    one, other = (module.bench(evaluate=False, **QUICK) for _ in range(2))
    assert "evaluation" not in by_stage(one) and not one["literal_requests"]
    assert sum(row["seconds"] for row in one["stages"]) <= one["total"]
    assert [(r["stage"], r["flops"]) for r in one["stages"]] == [(r["stage"], r["flops"]) for r in other["stages"]]
    assert (
        one["counts"] == other["counts"]
        and one["counts"]["rows"] == 2 * one["counts"]["contexts"]
        and one["counts"]["active"] < one["counts"]["tokens"]
    )


@pytest.mark.parametrize("steps", [1, 2])
def test_the_gradient_family_is_timed_by_its_slopes(steps: int, monkeypatch):
    method, usual = "ultraedit", mk.methods.ultraedit("tiny")
    changed = replace(usual, rule=replace(usual.rule, steps=steps))
    monkeypatch.setattr(module.methods, "method", lambda *_, **__: changed)
    found = module.bench(method=method, **QUICK)
    stages = by_stage(found)
    assert list(stages) == ["slopes", "solve", "evaluation"] and found["steps"] == steps
    assert all(row["seconds"] > 0 for row in stages.values()) and stages["slopes"]["flops"] > 0
    one = found["stage_one"]
    assert one["flops_per_step"] * steps == one["flops"] == stages["slopes"]["flops"]
    assert found["counts"]["contexts"] == 1 and f"slopes: {one['flops_per_step'] / 1e9:.3g} GFLOP" in module.text(found)
    with pytest.raises(ParameterError, match=f"of methods that plan targets; {method} does not: leave --literal out"):
        module.bench(method=method, literal=1, **QUICK)


def test_a_comparison_of_costs_leaves_out_the_literal_path_that_there_is_not():
    records = run_time.run_time("tiny", ("alphaedit", "ultraedit"), edits=2, steps=1, literal=1, evaluate=False)
    assert set(records[records.method == "ultraedit"].path) == {"accelerated"}
    assert set(records[records.method == "alphaedit"].path) == {"accelerated", "literal"}
    found = run_time.beside(records).set_index(["method", "stage"])
    own = found.loc["ultraedit"].accelerated
    assert own["edit"] == pytest.approx(own["slopes"] + own["solve"])


def work(lm, requests, steps, contexts=("{}", "I. {}", "We. {}", "He. {}", "It. {}")):
    rule = TargetRule(stop_below=0.0)
    return literal.flops(lambda steps: optimize_targets(lm, requests, contexts, 1, replace(rule, steps=steps)), steps)


def test_operations_grow_with_requests_and_steps_and_equal_a_hand_count():
    lm = random_model("gpt2")
    one, two, four = (work(lm, [FRANCE] * n, 5) for n in (1, 2, 4))
    assert two.step == pytest.approx(2 * one.step, rel=1e-3) and four.step == pytest.approx(4 * one.step, rel=1e-3)
    longer = work(lm, [FRANCE], 9)
    assert longer.step == one.step and longer.total == one.total + 4 * one.step
    target, rest = (len(reference.target_ids(lm, FRANCE)), len(lm.tokenizer(" is")["input_ids"]))
    # from the subject's last token on, the target's last one left out; and the locality row
    active = 5 * (rest + target) + 1
    block, width, words = 12 * 32**2, 32, lm.model.config.vocab_size
    # forward and backward, a multiply-add is two
    by_hand = 2 * 2 * (active * block * (lm.depth - 2) + (5 * target + 1) * width * words)
    assert one.step == pytest.approx(by_hand, rel=0.15)


def test_the_batched_key_pass_is_the_literal_one():
    lm = random_model("llama")
    rows = reference.key_pass(lm, reference.REQUESTS[:3], reference.CONTEXTS, 2).view(3, len(reference.CONTEXTS), -1)
    expected = reference.keys(lm, reference.REQUESTS[:3], reference.CONTEXTS, 2).T
    torch.testing.assert_close((rows[:, 0] + rows[:, 1:].mean(1)) / 2, expected, rtol=1e-10, atol=1e-12)


def test_the_literal_path_is_multiplied_up_by_tokens():
    lm = random_model("gpt2")
    texts = [["a"], ["a a a", "a"], ["a a"]]
    tokens = [reference.padded(lm, rows)["input_ids"].numel() for rows in texts]
    assert tokens[1] > 2 * tokens[0], "padding counts"
    assert (
        literal._share(lm, reference, texts, 1) == pytest.approx(sum(tokens) / tokens[0])
        and literal._share(lm, reference, texts, 3) == 1
    )


def test_literal_path_needs_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(literal, "FOLDER", tmp_path)
    monkeypatch.setattr(module, "load", lambda *_: pytest.fail("a model was loaded first"))
    with pytest.raises(ParameterError, match="run from a checkout"):
        module.bench(literal=1, **QUICK)
    (tmp_path / "reference.py").write_text("import no_such_package")
    with pytest.raises(ParameterError, match="no_such_package.*make test"):
        module.bench(literal=1, **QUICK)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"edits": 0}, "edits must be at least 1"), ({"steps": 0}, "steps must"), ({"rounds": 0}, "rounds must"),
        ({"literal": -1}, "literal must"), ({"literal": 9}, "9 of 2 requests")
    ],
)
def test_values_out_of_range_are_refused(wrong, told):
    with pytest.raises(ParameterError, match=told):
        module.bench(**QUICK | wrong)


def test_random_weights_need_a_known_size():
    with pytest.raises(ParameterError, match="Did you mean 'gpt2-xl'"):
        module.bench("gpt2xl", random_weights=True, **QUICK)
    with pytest.raises(ParameterError, match="Known: gpt-j-6b, gpt2-xl, llama3-8b, smollm2-135m, tiny"):
        sizes.random_model("microsoft/phi-1_5")
    for name, size in {
        "openai-community/gpt2-xl": "gpt2-xl", "EleutherAI/gpt-j-6b": "gpt-j-6b",
        "meta-llama/Meta-Llama-3-8B": "llama3-8b", "HuggingFaceTB/SmolLM2-135M": "smollm2-135m"
    }.items():
        assert sizes.size_of(name) == size


def test_random_weights_are_of_the_model_in_all_but_their_values():
    lm, real = sizes.random_model("tiny"), mk.load("tiny")
    assert {n: (p.shape, p.dtype) for n, p in lm.model.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in real.model.named_parameters()
    }
    assert (
        torch.isfinite(lm.model(torch.tensor([[1, 2, 3]])).logits).all()
        and torch.linalg.matrix_rank(lm.weight(lm.write_path(1))) == lm.width
    )
    found = sizes.random_statistics(lm, (0, 1), 0.02)
    assert found.null_ranks(0.02) == {0: 384, 1: 384}
    torch.testing.assert_close(found[1].spectrum, torch.linalg.eigvalsh(found[1].covariance))
    told = module.bench("tiny", "memit", random_weights=True, dtype="float32", **QUICK)
    assert (
        told["provenance"]["origin"]["origin"] == "random weights"
        and "random keys" in told["provenance"]["statistics"]
        and told["provenance"]["dtype"] == "float32"
    )


def test_methods_are_compared_within_one_process():
    methods = ("alphaedit", "metake", run_time.PLAIN)
    found = run_time.run_time(methods_=methods, literal=1, **QUICK | {"edits": 1})
    assert list(dict.fromkeys(found.method)) == list(methods) and set(found.path) == {"accelerated", "literal"}
    assert list(found[found.stage == "evaluation"].method) == ["alphaedit"] * 2
    refined = found[(found.stage == "refinement") & (found.path == "accelerated")].set_index("method").flops
    assert refined[run_time.PLAIN] < refined["metake"], "one prompt instead of all contexts"
    table = run_time.beside(found).set_index(["method", "stage"])
    whole = found[
        (found.method == "metake") & (found.path == "literal") & found.stage.isin(run_time.EDIT)
    ].seconds_per_edit.sum()
    assert (
        table.literal["metake", "edit"] == pytest.approx(whole)
        and table.ratio["metake", "edit"] == table.literal["metake", "edit"] / table.accelerated["metake", "edit"]
    )
    more, own = run_time.overhead(found).set_index("method"), table.accelerated["metake"]
    assert list(more.index) == ["metake", run_time.PLAIN] and (more > 1).all(axis=None)
    assert more.accelerated["metake"] == pytest.approx(
        own["edit"] / (own["targets"] + own["keys"] + own["solve"] + own["write"])
    )
    assert found.attrs["settings"]["literal_requests"] == 1 and found.attrs["settings"]["edits"] == 1


def test_speed_is_judged_by_every_method_timed_on_both_paths():
    times = [("alphaedit", "literal", 30.0), ("alphaedit", "accelerated", 2.0), ("metake", "literal", 28.0),
             ("metake", "accelerated", 2.1)]  # fmt: skip
    records = pd.DataFrame(
        [{"method": m, "stage": "targets", "path": p, "seconds": s, "seconds_per_edit": s} for m, p, s in times]
    )
    records.attrs["provenance"] = {"processor": "A, AVX2", "threads": 2}
    assert run_time.spread(records).to_dict() == pytest.approx({"accelerated": 0.05, "literal": 30 / 28 - 1})
    found = run_time.judge_speed(records)
    assert found["holds"] is True and found["margin"] == pytest.approx((40 / 3 - 10) / (40 / 3) / (0.05 + 30 / 28 - 1))
    assert found["decided_by"] == "AlphaEdit 15.0 times, MetaKE 13.3 times; on A, AVX2, 2 threads"
    assert run_time.judge_speed(records, 13)["holds"] is None and run_time.judge_speed(records, 16)["holds"] is False
    assert "within its error" in run_time.judge_speed(records, 13)["decided_by"]
    assert run_time.judge_speed(records[records.path == "accelerated"])["holds"] is None
    records.attrs.clear()
    assert "a processor that the recording does not name" in run_time.judge_speed(records)["decided_by"]


@pytest.mark.parametrize(("ratios", "holds"), [
    ((1.4, 1.6), True), ((1.1, 2.0), False), ((2.5, 1.5), None), ((1.6, 1.67), None),
])  # fmt: skip
def test_the_claim_is_judged_by_both_paths(ratios, holds):
    reported = run_time.reported_overhead(report.paper("table5"))
    assert (round(reported.ratio.min(), 2), round(reported.ratio.max(), 2), len(reported)) == (1.35, 1.66, 6)
    measured = pd.DataFrame(
        {"method": ["metake", run_time.PLAIN], "accelerated": [ratios[0], 1.0], "literal": [ratios[1], 1.0]}
    )
    spreads = pd.Series({"accelerated": 0.02, "literal": 0.02})
    found = run_time.judge(reported, measured, spreads)
    assert found["holds"] is holds and "on the literal path" in found["decided_by"]
    assert run_time.judge(reported, measured, spreads * float("nan"))["holds"] is None, "nothing is known of the error"


# On the command line


def test_command_tells_a_table_and_writes_all(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        cli.main("bench --edits 2 --steps 2 --literal 1 --text-tokens 3000 --method memit --json found.json".split())
        == 0
    )
    out, err = capsys.readouterr()
    found = json.loads((tmp_path / "found.json").read_text())
    assert (
        not err
        and out == f"{module.text(found)}\nwrote found.json\n"
        and [p.name for p in tmp_path.iterdir()] == ["found.json"]
    )
    assert out.startswith("tiny, memit: 2 edits of facts, 2 steps, float64 on cpu") and "on 1 of 2 requests" in out
    assert {line.split()[0] for line in out.splitlines()} >= {"targets", "keys", "solve", "write", "evaluation", "edit"}
    assert (
        found["edits"] == 2
        and found["steps"] == 2
        and {"versions", "device", "threads", "date", "dtype"} <= set(found["provenance"])
    )


MISTAKES = {
    "bench --litteral": "Did you mean --literal?",
    "bench --steps 0": "argument --steps: expected a whole number ≥ 1, found '0'",
    "bench --literal 0": "argument --literal: expected a whole number ≥ 1, found '0'",
    "bench --literal 5 --edits 4": "on 5 of 4 requests; expected at most 4",
    "bench --rounds x": "argument --rounds: expected a whole number ≥ 1, found 'x'",
    "bench --method alphaedti": "Did you mean 'alphaedit'",
    "bench --model llama3 --random-weights": "Did you mean 'llama3-8b'",
    "bench --model tiny --random-weights --dtype float31": "Did you mean 'float32'",
    "bench --edits 700 --text-tokens 3000": "has only 619",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_answered_in_one_line(words, capsys):
    assert cli.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("metake: error: ") and err.count("\n") == 1 and MISTAKES[words] in err


def test_a_long_stream_keeps_its_history_thin_and_then_as_a_matrix():
    found = run_time.stream(edits=450, batch=150)
    assert list(found.edits) == [150, 300, 450] and list(found.history) == ["thin", "thin", "matrix"]
    stages = found[["digest", "targets", "keys", "solve", "write"]]
    assert (stages > 0).all(axis=None) and (stages.sum(axis=1) - found.edit).abs().max() < 1e-12
    rising = pd.DataFrame({"edits": range(100, 2100, 100), "edit": range(1, 21)})
    assert run_time.growth(rising) == 19 / 2 and run_time.growth(rising.assign(edit=3.0)) == 1
