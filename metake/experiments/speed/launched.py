"""What one step of the refinement starts on a device: the model's own operations, and by name what comes beside them.

What is small takes a fast device less time than Python needs to start it: of the operations that a step starts beside
the model's, each is time that no faster device saves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from metake import methods
from metake.data.requests import EditRequest
from metake.editing.bilevel import refine
from metake.editing.outer import LastLayer
from metake.editing.targets import optimize_targets
from metake.experiments.cases import read_cases, select
from metake.language.model import LanguageModel, load

# what starts nothing on a device: other views of a tensor, and memory for one
VIEWS = {
    "view", "t", "transpose", "unsqueeze", "expand", "detach", "slice", "select", "permute", "squeeze", "alias",
    "split", "split_with_sizes", "_unsafe_view", "lift_fresh", "empty", "empty_like", "new_empty", "as_strided",
    "unbind", "promote_types"
}
KINDS = {
    "products": {"mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu"},
    "copies from one dtype or place to another": {"_to_copy", "copy_", "clone", "cat", "stack"},
    "choosing rows and positions": {
        "index", "index_put", "index_put_", "_index_put_impl_", "index_select", "index_add", "index_add_", "gather",
        "scatter", "scatter_add", "embedding", "select_backward", "slice_backward", "new_zeros", "zeros", "zeros_like",
        "nonzero", "arange"
    },
    "losses of each request": {
        "_log_softmax", "_log_softmax_backward_data", "_softmax", "exp", "log", "logsumexp", "sum", "mean", "neg"
    },
    "the optimizer's step, and which plan is kept": {
        "lerp_", "addcmul_", "addcdiv_", "sqrt", "div_", "add_", "mul_", "linalg_vector_norm", "lt", "gt", "le",
        "where", "minimum", "maximum", "isfinite", "all", "any", "_local_scalar_dense", "sub_"
    }
}  # fmt: skip
REST = "sums, products and quotients of numbers"


class Launches(TorchDispatchMode):
    """Counts operations by name while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[operation._schema.name.partition("::")[2]] += 1
        return operation(*args, **(kwargs or {}))

    @property
    def launched(self) -> Counter[str]:
        """Those that start something on a device."""
        return Counter({name: count for name, count in self.operations.items() if name not in VIEWS})


def one_step(call: Callable[[int], object], few: int = 1, many: int = 3) -> dict[str, float]:
    """Operations of one of many equal steps, by name: what more steps add. call: makes so many of them."""
    found = []
    for steps in (few, many):
        with Launches() as seen:
            call(steps)
        found.append(seen.launched)
    names = dict.fromkeys((*found[1], *found[0]))
    return {name: (found[1][name] - found[0][name]) / (many - few) for name in names}


def of_the_model(outer: LastLayer) -> Counter[str]:
    """The model's own operations in a step: a forward of its blocks above the planted layer, logits, and the backward
    of their sum, for every micro-batch."""
    with Launches() as seen:
        for part in outer.parts:
            start = type(part.state)(*(t if t is None else t.requires_grad_() for t in part.state))
            part.run.logits(1, start, part.bucket.places).sum().backward()
    return seen.launched


def launched(model: str = "tiny", edits: int = 8, data: str = "facts", seed: int = 0) -> pd.DataFrame:
    """Operations of one step of MetaKE's refinement: row (what they do), of the model itself, of the step, beside the
    model. Products go to the library that every processor has, so that the counts are the same on all."""
    lm = load(model)
    requests = [case.request for case in select(lm, read_cases(data), edits, seed)]
    with torch.backends.mkldnn.flags(enabled=False):
        step, own = _counted(lm, requests)
    kinds = {name: kind for kind, names in KINDS.items() for name in names}
    rows = [
        {"operations": kinds.get(name, REST), "step": step.get(name, 0.0), "of the model": own[name]}
        for name in dict.fromkeys((*step, *own))
    ]
    found = pd.DataFrame(rows).groupby("operations")[["step", "of the model"]].sum().reindex([*KINDS, REST]).fillna(0)
    found.loc["all"] = found.sum()
    found["beside it"] = found["step"] - found["of the model"]
    found = found.round().astype(int).reset_index()
    found.attrs["settings"] = {"edits": edits, "seeds": [seed]}
    return found


def _counted(lm: LanguageModel, requests: Sequence[EditRequest]) -> tuple[dict[str, float], Counter[str]]:
    editor = methods.metake(lm.name)
    layer, contexts = editor.layers[-1], ("{}",)
    targets = optimize_targets(lm, requests, contexts, layer, replace(editor.target, steps=2, stop_below=0.0))
    width = lm.shape(lm.write_path(layer))[1]
    gate = torch.ones(len(requests), width, dtype=torch.float64, device=lm.device) / width
    step = one_step(
        lambda steps: refine(lm, requests, contexts, targets, gate, replace(editor.refine, steps=steps))
    )
    with lm.ready(gradients=True):
        return step, of_the_model(LastLayer(lm, requests, contexts, targets, gate, editor.refine))
