"""How a run asks: as a chat, or by what its file says stands before a target."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
from models import small_tokenizer, stand_in

import metake as mk
from metake.commands import cli
from metake.data.facts import facts_records
from metake.experiments import runs
from metake.experiments.runs import RunConfig, open_run, reevaluate, run
from metake.experiments.studies import finished, quickstart
from metake.support.errors import ParameterError

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CONFIG = RunConfig(method="ultraedit", edits=2, batch=2)


def chatty(*_, **__):
    lm = stand_in()
    lm.tokenizer = copy.deepcopy(small_tokenizer())
    lm.tokenizer.chat_template = CHAT
    return lm


@pytest.fixture
def a_chat_model(monkeypatch):
    for module in (runs, finished):
        monkeypatch.setattr(module, "load", chatty)
    monkeypatch.setattr(mk, "load", chatty)
    brief = {"layers": (1,), "target": mk.TargetRule(steps=2), "contexts": ("{}", "So it is. {}")}
    made = mk.methods.method
    monkeypatch.setattr(
        mk.methods, "method", lambda name, *given, **c: made(name, *given, **(brief if name == "memit" else {}) | c)
    )


def test_a_run_as_a_chat_is_evaluated_resumed_and_taken_up_as_one(a_chat_model, tmp_path):
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, facts_records()[:3])))
    own = replace(CONFIG, data=str(tmp_path / "data.jsonl"))
    config = replace(own, chat=True)
    found = run(config, tmp_path / "chat")
    lm = chatty()
    cases = runs.cases_of(config, lm)
    assert all(c.request.text.endswith("<|assistant|>\n") for c in cases)
    assert found.before.cases == mk.evaluate(lm, cases).cases != mk.evaluate(lm, runs.cases_of(own, lm)).cases
    assert open_run(tmp_path / "chat")[0] == config
    assert run(config, tmp_path / "chat").cases == found.cases
    assert finished.finished(tmp_path / "chat").cases == cases
    with pytest.raises(ParameterError, match="another chat"):
        run(own, tmp_path / "chat")
    plain, asked = run(own, tmp_path / "plain"), reevaluate(tmp_path / "plain", chat=True)
    assert asked.before.cases == found.before.cases != plain.before.cases


def test_a_run_of_before_knows_no_chat(a_chat_model, tmp_path):
    run(CONFIG, tmp_path / "a")
    file = tmp_path / "a/config.json"
    old = {k: v for k, v in json.loads(file.read_text()).items() if k != "chat"}
    file.write_text(json.dumps(old))
    assert open_run(tmp_path / "a")[0] == CONFIG and run(CONFIG, tmp_path / "a")


def test_a_model_that_cannot_chat_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "load", stand_in)
    with pytest.raises(ParameterError, match="cannot be asked as a chat"):
        run(replace(CONFIG, chat=True), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_files_seam_is_heeded_by_its_run(a_chat_model, tmp_path):
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(r | {"seam": ""}) for r in facts_records()[:3]))
    direct = runs.cases_of(replace(CONFIG, data=str(tmp_path / "data.jsonl")), chatty())
    assert {p.seam for c in direct for p in (c.request, *c.probes) if getattr(p, "kind", "") != "generation"} == {""}


# On the command line


FACT = ("--prompt", "The capital of {} is", "--subject", "France", "--target", "Rome", "--text-tokens", "900")


@pytest.fixture
def command(a_chat_model, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*words):
        code = cli.main(list(words))
        return (code, *capsys.readouterr())

    return call


def test_edit_asks_as_it_is_told(command, monkeypatch):
    seen = []
    monkeypatch.setattr(quickstart, "compare", lambda lm, edit, request: seen.append(request) or "")
    for words in ((), ("--direct",), ("--chat",)):
        assert command("edit", "tiny", *FACT, "--method", "memit", *words)[0] == 0
    assert [r.seam for r in seen] == [None, "", ""]
    assert seen[2] == mk.chat(chatty(), seen[:1])[0] and seen[2].text.endswith("France is<s>\n<|assistant|>\n")


def test_edit_shows_the_question_without_its_frame(command):
    code, out, err = command("edit", "tiny", *FACT, "--method", "memit", "--chat")
    assert code == 0 and len(out.splitlines()) == 4 and "before The capital of France is …" in out


def test_eval_asks_a_run_as_a_chat(command, monkeypatch):
    asked = []
    monkeypatch.setattr(runs, "reevaluate", lambda *given: asked.append(given) or mk.Evaluation(()))
    assert command("eval", "a", "--chat")[0] == command("eval", "a")[0] == 0
    assert asked == [("a", None, True), ("a", None, False)]
    monkeypatch.setattr(runs, "run", lambda config, *_: asked.append(config.chat) or mk.Evaluation(()))
    assert command("run", "--out", "a", "--chat")[0] == 0 and asked[2:] == [True]


@pytest.mark.parametrize("place", ["--prompt", "--subject", "--target"])
@pytest.mark.parametrize("stray", ["\udcff", "\ud83d"])
def test_a_stray_byte_is_answered_in_one_line_before_a_model_is_loaded(command, monkeypatch, place, stray):
    monkeypatch.setattr(mk, "load", lambda *_: pytest.fail("a model was loaded first"))
    words = list(FACT)
    words[words.index(place) + 1] += stray
    code, out, err = command("edit", "tiny", *words)
    assert code == 2 and not out and err.count("\n") == 1 and "unpaired surrogate or stray byte" in err


def test_next_words_follow_the_seam():
    lm = chatty()
    plain, blank = (quickstart.next_words(lm, text) for text in ("France is", "France is "))
    assert plain == blank != quickstart.next_words(lm, "France is ", given="")
