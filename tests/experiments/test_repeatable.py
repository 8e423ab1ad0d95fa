"""What must be equal to the bit uses other algorithms, says so in its record, and leaves torch as it was."""

import torch
from models import random_model
from torch.utils._python_dispatch import TorchDispatchMode

from metake.commands.cli import _parser
from metake.experiments.repeatable import repeatable


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.seen.add(operation._schema.name)
        return operation(*args, **(kwargs or {}))


def attention(lm) -> bool:
    """Whether a fused kernel computes it."""
    with Names() as names, torch.no_grad():
        lm.model(torch.tensor([[1, 2, 3]]))
    return any("flash" in name or "efficient" in name for name in names.seen)


def test_the_flag_chooses_other_algorithms_and_is_recorded():
    lm = random_model("llama", torch.float32, depth=1)
    assert attention(lm) and "deterministic" not in lm.base()
    with repeatable():
        assert torch.are_deterministic_algorithms_enabled() and not attention(lm)
        assert lm.base()["deterministic"] is True
    assert not torch.are_deterministic_algorithms_enabled() and attention(lm) and "deterministic" not in lm.base()


def test_two_commands_take_it_and_it_is_off_by_default():
    run = ["run", "--out", "x"]
    assert not _parser().parse_args(run).deterministic and _parser().parse_args([*run, "--deterministic"]).deterministic
