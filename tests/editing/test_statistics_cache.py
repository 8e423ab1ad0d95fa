"""The cache of key statistics: a file a layer, found without reading the text as tokens, never another state's."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_model
from same import contents
from torch import nn

from metake import NumericalError, statistics
from metake.algebra.geometry import KeyStatistics, inverse_covariance, null_space
from metake.editing.statistics import Statistics, checksum

LINES = [
    f"On day {i} the capital of country {i * 7 % 60} was moved to Rome, Berlin or Madrid, and back." for i in range(8)
]


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")
    return str(path)


def files(cache) -> list[str]:
    return sorted(name for name in contents(cache) if name.endswith(".safetensors"))


def same(a: KeyStatistics, b: KeyStatistics) -> bool:
    return a.count == b.count and torch.equal(a.moment, b.moment)


def test_methods_of_other_layers_share_what_is_there(text, empty_cache, monkeypatch):
    lm, asked = random_model("gpt2"), []
    read = lm.read
    monkeypatch.setattr(lm, "read", lambda batch, keys: asked.append(tuple(keys)) or read(batch, keys))
    whole = statistics(lm, text, [0, 1, 2], cache=False)
    asked.clear()
    first = statistics(lm, text, [1])
    more = statistics(lm, text, [2, 0, 1])
    assert set(asked) == {(1,), (0, 2)} and len(files(empty_cache)) == 3
    asked.clear()
    for layers in ([0], [0, 2], [1, 2], [0, 1, 2]):
        found = statistics(lm, text, layers)
        assert list(found) == layers and all(same(found[i], whole[i]) for i in layers)
    assert not asked and more.digest == whole.digest and first.digest == statistics(lm, text, [1]).digest
    assert len({statistics(lm, text, layers).digest for layers in ([0], [1], [0, 1], [0, 1, 2])}) == 4


def test_a_hit_reads_no_text_as_tokens(text, empty_cache, monkeypatch):
    lm = random_model("llama")
    first, lengths = statistics(lm, text, [1, 2]), []
    tokenizer = lm.tokenizer
    monkeypatch.setattr(lm, "tokenizer", _Counting(tokenizer, lengths))
    monkeypatch.setattr("metake.editing.statistics.documents", lambda *_: pytest.fail("the text was read"))
    assert statistics(lm, text, [1, 2]).digest == first.digest and sum(lengths) < 100


class _Counting:
    def __init__(self, inner, lengths):
        self.inner, self.lengths = inner, lengths

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, text, **more):
        self.lengths.append(len(text))
        return self.inner(text, **more)


def test_eigenvectors_are_for_those_who_project(text, empty_cache, monkeypatch):
    lm, calls = random_model("gpt2"), []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda *a: calls.append(1) or eigh(*a))
    for _ in range(2):
        inverse_covariance(1.0, 1e-3)(statistics(lm, text, [0, 1])[1])
    assert not calls and not [name for name in contents(empty_cache) if name.endswith(".eigh")]
    made = null_space(1e9)(statistics(lm, text, [0, 1])[1])
    assert len(calls) == 1
    again = statistics(lm, text, [1])[1]
    read = null_space(1e9)(again)
    assert len(calls) == 1, "computed again"
    assert torch.equal(made._thin, read._thin)
    before = again.spectrum[-1].item()
    again.update(torch.full((9, again.dim), 5.0))
    assert again.spectrum[-1] > before and len(calls) == 2, "later keys change the spectrum"
    (kept,) = (path for path in (empty_cache / "statistics").iterdir() if path.suffix == ".eigh")
    for damage in (b"", kept.read_bytes()[:-9]):
        kept.write_bytes(damage)
        assert statistics(lm, text, [1])[1].spectrum[-1].item() == before


# The state that the forward really uses


class _Switched(nn.Module):
    """What people wrap modules with."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.enabled = inner, True

    def forward(self, *args, **more):
        out, *rest = self.inner(*args, **more)
        return (out * (3.0 if self.enabled else 1.0), *rest)


def _adapters(lm):
    from peft import LoraConfig

    lm.model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


def _lora(lm):
    return lm.model.get_submodule("model.layers.0.self_attn.q_proj")


CHANGES = {
    "adapters are switched off": (_adapters, lambda lm: lm.model.disable_adapters()),
    "an adapter's scale": (_adapters, lambda lm: _lora(lm).scaling.__setitem__("default", 9.0)),
    "a switch of one's own": (
        lambda lm: setattr(lm.block(1), "self_attn", _Switched(lm.block(1).self_attn)),
        lambda lm: setattr(lm.block(1).self_attn, "enabled", False),
    ),
    "a norm's epsilon": (lambda lm: None, lambda lm: setattr(lm.block(1).input_layernorm, "variance_epsilon", 0.3)),
    "attention's scale": (lambda lm: None, lambda lm: setattr(lm.block(0).self_attn, "scaling", 2.0)),
    "another activation": (lambda lm: None, lambda lm: setattr(lm.block(1).mlp, "act_fn", nn.Tanh())),
    "one digit of a weight": (lambda lm: None, lambda lm: lm.weight(lm.write_path(0))[3].add_(1e-9)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_state_of_the_model_has_statistics_of_its_own(text, empty_cache, name):
    prepare, change = CHANGES[name]
    lm = random_model("llama")
    prepare(lm)
    before = statistics(lm, text, [2])
    assert statistics(lm, text, [2]).digest == before.digest and len(files(empty_cache)) == 1
    change(lm)
    after = statistics(lm, text, [2])
    assert after.digest != before.digest and same(after[2], statistics(lm, text, [2], cache=False)[2])
    assert not same(after[2], before[2]), "the change plays no part: too easy"


def test_running_the_model_is_no_change(text, empty_cache):
    for kind in ("gpt_neox", "mistral"):
        lm = random_model(kind)
        first = statistics(lm, text, [1]).digest
        lm.model(torch.tensor([[1, 2, 3]]), use_cache=True)
        assert statistics(lm, text, [1]).digest == first


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300_000), st.data(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int8]))
def test_a_checksum_sees_every_entry_and_no_layout(size, data, dtype):
    tensor = torch.arange(size).remainder(101).to(dtype)
    whole, at = checksum(tensor), data.draw(st.integers(0, size - 1))
    strided = torch.stack([tensor, tensor], 1)[:, 0]
    assert checksum(strided) == whole == checksum(tensor.clone())
    tensor[at] += 1
    assert checksum(tensor) != whole
    tensor[at] -= 1
    other = data.draw(st.integers(0, size - 1))
    if tensor[at] != tensor[other]:
        tensor[[at, other]] = tensor[[other, at]]
        assert checksum(tensor) != whole, "two entries were exchanged"


# Not a number


def _nan(lm):
    """One number of what a block writes."""
    lm.write(0).register_forward_hook(lambda _, __, out: out.index_fill(-1, torch.tensor([2]), torch.nan))


def _late(lm):
    """One token in the whole text that overflows."""
    rome = lm.tokenizer("Rome")["input_ids"][-1]
    lm.model.get_input_embeddings().register_forward_hook(
        lambda _, ids, out: out.masked_fill((ids[0] == rome)[..., None], torch.inf)
    )


@pytest.mark.parametrize(("spoil", "dtype"), [
    (_nan, torch.float64), (_late, torch.float32), (lambda lm: lm.weight(lm.write_path(0)).mul_(6e4), torch.float16),
], ids=["one number", "one token", "overflow"])  # fmt: skip
def test_statistics_that_are_no_numbers_are_refused_and_never_kept(text, empty_cache, spoil, dtype):
    lm = random_model("gpt2", dtype)
    spoil(lm)
    for _ in range(2):
        with pytest.raises(NumericalError, match=r"keys of layer \d of 'random-gpt2' .* are not finite; look for NaN"):
            statistics(lm, text, [1, 2])
        assert not contents(empty_cache)


def test_files_of_an_earlier_version_still_open(text, tmp_path):
    """They held all layers, with their eigenvectors."""
    found = statistics(random_model("gpt2"), text, [1, 2], cache=False)
    for one in found.values():
        one.spectrum.sum()
    found.save(tmp_path / "old")
    again = Statistics.load(tmp_path / "old", found.digest)
    assert all("_eigh" in one.__dict__ and same(one, found[i]) for i, one in again.items())
    assert json.dumps(again.source) == json.dumps(found.source)
