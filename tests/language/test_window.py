"""What fits a model's window: rows, not the rectangle that they are padded to."""

from __future__ import annotations

import pytest
import torch
from models import CONFIGS, random_model

from metake import EditRequest, RequestError
from metake.data.requests import Cases, EditCase, Probe
from metake.experiments.cases import OPENING, TOO_LONG, select
from metake.language.capture import Places
from metake.language.generation import _aligned, _written
from metake.language.prefixes import Prefixed, Split
from metake.language.tokens import encode, pad, prompted
from metake.scoring.evaluation import evaluate, read

WINDOW = 128
every = pytest.mark.parametrize("kind", CONFIGS)


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(1, 384, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@every
@torch.no_grad()
def test_rows_that_fit_alone_fit_together_whatever_they_share(kind):
    """Beginnings of 100 and 3 tokens, ends of 5 and 100: 200 columns."""
    lm = random_model(kind)
    rows, cuts = [tokens(105), tokens(103, 1), tokens(WINDOW, 2)], [100, 3, 60]
    run = Prefixed(lm, rows, cuts)
    assert run.tail.mask.shape[1] > WINDOW
    last = [len(row) - cut - 1 for row, cut in zip(rows, cuts, strict=True)]
    found = run.logits(-1, Split(None, None), Places.of(range(3), last, run.tail.ids.shape[1], lm.device))
    for row, logits in zip(rows, found, strict=True):
        torch.testing.assert_close(logits, lm.model(torch.tensor([row])).logits[0, -1])


@torch.no_grad()
def test_rows_that_end_in_one_column_fit_together():
    lm = random_model("gpt2")
    rows = [tuple(tokens(120)), tuple(tokens(6, 1))]

    def written(*rows):
        steps = _written(lm, _aligned(rows, lm.device), 8, lambda logits, _: logits.argmax(-1, keepdim=True))
        return torch.cat([new for new, _ in steps], 1)

    together = written(*rows)
    for row, new in zip(rows, together, strict=True):
        assert torch.equal(written(row)[0], new)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_row_that_does_not_fit_is_named_by_its_text(kind):
    lm = random_model(kind)
    lm.run(pad([tokens(WINDOW), tokens(3)], "cpu"))
    long = "The capital of Rome is Paris" * 60
    with pytest.raises(RequestError, match=r"a row of \d+ tokens does not fit 'random-.*room for 128: '.*The capital"):
        read(lm, [("France is", "Rome"), (long, "Rome")])
    with pytest.raises(RequestError, match="a row of 129 tokens .*shorten its prompt") as told:
        lm.run(pad([tokens(3), tokens(WINDOW + 1)], "cpu"))
    assert len(str(told.value)) < 400 and "\n" not in str(told.value)


# Files


def case(id, prompt="The capital of {} is", target="Rome", rival="Paris", more=()):
    request = EditRequest(prompt, f"France{id}", target, id)
    return EditCase(request, (Probe("efficacy", request.text, target, rival), *more))


def of_length(lm, count: int) -> str:
    """A text of so many tokens."""
    text = "I think" + " the" * count
    words = text.split()
    return " ".join(words[: len(words) - (len(encode(lm.tokenizer, text)) - count)])


def test_records_whose_rows_do_not_fit_are_skipped_counted_and_named(caplog):
    lm = random_model("gpt2")
    long, fits = of_length(lm, WINDOW + 1), of_length(lm, WINDOW)
    assert len(encode(lm.tokenizer, long)) == WINDOW + 1
    cases = {
        "fine": case("fine"),
        "prompt": case("prompt", long + " {} is"), "target": case("target", target=long),
        "rival": case("rival", rival=long),
        "paraphrase": case("paraphrase", more=[Probe("paraphrase", long, "Rome", "Paris")]),
        "neighbor": case("neighbor", more=[Probe("neighborhood", "Rome is", long, "Paris")]),
        "generation": case("generation", more=[Probe("generation", long)]),
        "just": case("just", more=[Probe("generation", fits), Probe("generation", "a", target=long)]),
    }  # fmt: skip
    found = select(lm, Cases(cases.values(), "counterfact", "a.json", {"other": 1}, ("x",)), 2, 0)
    assert {c.request.id for c in found} == {"fine", "just"}
    with pytest.raises(Exception, match=f"{TOO_LONG}.: 6"):
        select(lm, Cases(cases.values(), source="a.json"), 3, 0)
    caplog.clear()
    found = select(lm, Cases(list(cases.values())[:2], "counterfact", "a.json", {"other": 1}, ("x",)), 1, 1)
    if TOO_LONG not in found.skipped:  # the draw met the other one first
        found = select(lm, Cases(list(cases.values())[1::-1], "counterfact", "a.json", {"other": 1}, ("x",)), 1, 1)
    assert found.skipped == {"other": 1, TOO_LONG: 1} and found.skipped_ids == ("x", "prompt")
    assert f"a.json: 1 records skipped: {TOO_LONG} of 128 tokens (case_id prompt)" in caplog.text
    evaluate(lm, [cases["just"]])


@pytest.mark.parametrize(("more", "kept"), [(0, True), (1, False)])
def test_a_request_leaves_room_for_its_context_templates(more, kept):
    lm = random_model("gpt2")
    request = EditRequest("{} is" + " the" * 150, "Rome", "France", "a")
    while sum(map(len, prompted(lm.tokenizer, request.text, "France"))) - 1 + OPENING > WINDOW + more:
        request = EditRequest(request.prompt.removesuffix(" the"), "Rome", "France", "a")
    cases = Cases([EditCase(request, ()), case("b")])
    taken = {c.request.id for seed in range(4) for c in select(lm, cases, 1, seed)}
    assert ("a" in taken) == kept and "b" in taken


def test_a_model_without_a_window_has_room(monkeypatch):
    lm = random_model("gpt2")
    monkeypatch.setattr(type(lm.model.config), "attribute_map", {})  # its own name for it is n_positions
    assert lm.window == float("inf") and select(lm, Cases([case("a")]), 1, 0)
