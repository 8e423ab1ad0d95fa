"""Frozen float32 products by another library: the same numbers and slopes, on every architecture,
and nothing left behind.
"""

from __future__ import annotations

import pytest
import torch
from models import CONFIGS, random_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from metake.language import kernels
from metake.language.model import LanguageModel
from metake.language.tokens import pad
from metake.support import machine

pytestmark = pytest.mark.skipif(
    not (kernels.OPERATIONS and torch.backends.mkldnn.is_available()), reason="this torch has no oneDNN"
)
ROWS = [[5, 9, 7, 11], [3, 8], [2, 4, 6]]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A processor on which MKL is the slower one, whatever this machine is."""
    monkeypatch.setattr(kernels, "mkl_is_slow", lambda: True)
    return monkeypatch


def counts(call) -> dict[str, int]:
    """Operations of a call: through oneDNN, and through torch's own products."""
    with FlopCounterMode(display=False, custom_mapping=kernels.OPERATIONS) as counter:
        call()
    found = counter.get_flop_counts()["Global"]
    fast = sum(n for op, n in found.items() if op in kernels.OPERATIONS)
    return {"fast": fast, "own": sum(found.values()) - fast}


def scored(lm: LanguageModel) -> tuple[Tensor, Tensor]:
    """Logits of padded rows that go on after block 1, and their slope in its output."""
    batch = pad(ROWS, lm.device)
    state = lm.read(batch, states=[1])[1][1].detach().requires_grad_()
    with lm.resumed(1, state):
        logits = lm.logits(batch, torch.tensor([0, 1, 2, 2]), torch.tensor([3, 1, 0, 2]))
    (logits.square().sum() / logits.shape[-1]).backward()
    return logits.detach(), state.grad


@pytest.mark.parametrize("shape", [(3,), (1, 4), (2, 5), (2, 3, 7)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_values_slopes_and_slopes_of_slopes_are_those_of_torch(served, shape, transposed, bias):
    torch.manual_seed(len(shape))
    x, weight, added = (
        torch.randn(*shape, 6), 0.3 * (torch.randn(6, 5).t() if transposed else torch.randn(5, 6)),
        torch.randn(5) if bias else None
    )
    found = []
    for product in (kernels.linear, nn.functional.linear):
        leaf = x.clone().requires_grad_()
        out = product(leaf, weight, added)
        (slope,) = torch.autograd.grad((out**3).sum(), leaf, create_graph=True)
        found.append((out.detach(), slope.detach(), *torch.autograd.grad(slope.square().sum(), leaf)))
    assert counts(lambda: kernels.linear(x, weight, added))["fast"] == 2 * x.numel() * 5
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_architecture_runs_its_linear_maps_there_and_finds_the_same(kind, served):
    lm = random_model(kind, torch.float32)
    fast, found = counts(lambda: scored(lm)), scored(lm)
    served.setattr(kernels, "mkl_is_slow", lambda: False)
    own, expected = counts(lambda: scored(lm)), scored(lm)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert fast["fast"] + fast["own"] == own["own"] and own["fast"] == 0, "no operation is lost or counted twice"
    assert fast["fast"] > 0.8 * own["own"], "all but attention scores"
    assert not any("forward" in module.__dict__ for module in lm.model.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_stay_with_torch(dtype, served):
    assert counts(lambda: scored(random_model("llama", dtype)))["fast"] == 0


def test_who_wants_another_gradient_precision_or_library_gets_it(served):
    x, weight = torch.randn(3, 6), torch.randn(5, 6)
    assert counts(lambda: kernels.linear(x, weight))["fast"] > 0
    assert counts(lambda: kernels.linear(x.double(), weight.double()))["fast"] == 0
    assert counts(lambda: kernels.linear(x, weight.clone().requires_grad_()))["fast"] == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert counts(lambda: kernels.linear(x, weight))["fast"] == 0
        assert kernels.linear(x, weight).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert counts(lambda: kernels.linear(x, weight))["fast"] == 0
    assert kernels.linear(x[:0], weight).shape == (0, 5)
    served.setattr(kernels, "mkl_is_slow", lambda: False)
    assert counts(lambda: kernels.linear(x, weight))["fast"] == 0


def test_an_error_inside_and_somebody_elses_forward_are_left_alone(served):
    modules = [
        nn.Linear(4, 4).requires_grad_(False), Conv1D(4, 4).requires_grad_(False),
        nn.Linear(4, 4).requires_grad_(False)
    ]
    modules[2].forward = theirs = lambda x: x
    with pytest.raises(KeyError), kernels.fast_products(modules):
        assert (
            modules[0].forward.func is kernels.linear
            and modules[1].forward.func is kernels.linear
            and modules[2].forward is theirs
        )
        raise KeyError
    assert (
        "forward" not in modules[0].__dict__ and "forward" not in modules[1].__dict__ and modules[2].forward is theirs
    )


def test_a_weight_changed_between_forward_and_backward_is_an_error(served):
    x, weight = torch.randn(2, 6, requires_grad=True), torch.randn(5, 6)
    out = kernels.linear(x, weight)
    weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(
    "capability, vendor, slow",
    [
        ("AVX512", "AuthenticAMD", True), ("AVX512", "GenuineIntel", False), ("AVX2", "AuthenticAMD", False),
        ("AVX512", "", False)
    ],
)
def test_only_a_processor_whose_avx512_mkl_ignores_is_served(capability, vendor, slow, monkeypatch, tmp_path):
    told = tmp_path / "cpuinfo"
    told.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(machine, "Path", lambda _: told)
    for library in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(library, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert machine.mkl_is_slow.__wrapped__() is slow
