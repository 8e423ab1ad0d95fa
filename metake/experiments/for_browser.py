"""What a browser needs of `tiny` to edit it: weights in half precision, tokenizer, metrics, facts, plans; as scripts.

A page that is opened from the disk may not read a file, but may run a script: each part is one call with a header of
plain data and all tensors as base64. Nothing of it is kept in the repository: it is written from the package when the
book is built, and is the same each time.
"""

from __future__ import annotations

import base64
import json
import tomllib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metake.algebra.geometry import KeyStatistics
from metake.data.files import packaged
from metake.editing.diagnosis import diagnose
from metake.editing.recipes import recipe
from metake.experiments.in_the_page import STRENGTHS, Contexts, Plans, edited, editor, next_token
from metake.language.model import LanguageModel
from metake.language.tokens import Rows

ASKED = (
    ("rome", None), ("memit", 200.0), ("memit", 2000.0), ("memit", 20000.0), ("alphaedit", 0.1), ("alphaedit", 1.0),
    ("alphaedit", 10.0), ("metake", 0.1), ("metake", 1.0), ("metake", 10.0)
)  # fmt: skip
LIKELIEST = 12  # tokens of an answer
CALL = "metakeEditData"  # the function of the page's script that takes a part
HALF, WHOLE, SINGLE = "f16", "i8", "f32"
DTYPES = {HALF: torch.float16, WHOLE: torch.int8, SINGLE: torch.float32}


def weights(lm: LanguageModel) -> dict[str, Tensor]:
    """The model's tensors by short names; matrices as (d_out, d_in), as the library has them."""
    own = lm.model.transformer
    found = {"embedding": own.wte.weight, "position": own.wpe.weight}
    found |= {"final.weight": own.ln_f.weight, "final.bias": own.ln_f.bias}
    for i, block in enumerate(own.h):
        attention, mlp = block.attn, block.mlp
        linear = {"qkv": attention.c_attn, "out": attention.c_proj, "inner": mlp.c_fc, "write": mlp.c_proj}
        for name, part in ({"norm1": block.ln_1, "norm2": block.ln_2} | linear).items():
            found[f"{i}.{name}.weight"] = part.weight.T if name in linear else part.weight  # Conv1D stores (in, out)
            found[f"{i}.{name}.bias"] = part.bias
    return found


def metrics(statistics: Mapping[int, KeyStatistics], threshold: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of each layer what projects (the thinner of U₀ and its complement, as `NullSpace` has it), and what inverts C:
    the rows of its Cholesky factor's lower triangle, one after the other."""
    thin, factors = {}, {}
    for layer, one in statistics.items():
        rank, vectors = one.null_rank(threshold), one._eigh[1]
        side, name = (vectors[:, :rank], "null") if rank <= one.dim - rank else (vectors[:, rank:], "kept")
        largest = side.gather(0, side.abs().argmax(0, keepdim=True))  # an eigenvector's sign says nothing
        thin[f"{layer}.{name}"] = (side * largest.sign()).T
        factor = torch.linalg.cholesky(one.covariance)
        factors[f"{layer}.factor"] = factor[tuple(torch.tril_indices(one.dim, one.dim))]
    return thin, factors


def words(lm: LanguageModel) -> dict[str, Any]:
    """The tokenizer: every token by its number, and the merges in their order."""
    told = json.loads(lm.tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = sorted(told["vocab"], key=told["vocab"].__getitem__)
    return {"tokens": vocabulary, "merges": [m if isinstance(m, str) else " ".join(m) for m in told["merges"]]}


def settings(lm: LanguageModel, contexts: Contexts) -> dict[str, Any]:
    """Layers, λ and context templates of each method, and the model's sizes."""
    config, numbers = lm.model.config, recipe(lm.name)
    family = {"layers": numbers.layers, "contexts": contexts["family"]}
    rome = {"layers": [numbers.rome_layer], "contexts": contexts["rome"], "usual": None}
    methods = {
        "rome": rome, "memit": family | {"usual": numbers.covariance_weight},
        "alphaedit": family | {"usual": numbers.ridge}, "metake": family | {"usual": numbers.ridge}
    }
    sizes = {"width": config.n_embd, "inner": config.n_inner, "depth": config.n_layer, "heads": config.n_head}
    return {
        "sizes": sizes | {"window": config.n_positions, "small": config.layer_norm_epsilon}, "methods": methods,
        "strengths": list(STRENGTHS)
    }


def relations() -> list[dict[str, Any]]:
    """The embedded facts, a relation each: its prompt, its other wordings, and object → subjects."""
    kept = ("id", "name", "prompt", "paraphrases", "objects")
    return [{name: entry[name] for name in kept} for entry in tomllib.loads(packaged("facts.toml"))["relation"]]


def script(name: str, told: Mapping[str, Any], tensors: Mapping[str, tuple[Tensor, str]]) -> str:
    """One part as a script. tensors: each with the kind of number that it is written in."""
    index, raw = [], bytearray()
    for label, (tensor, kind) in tensors.items():
        values = tensor.detach().to(DTYPES[kind]).contiguous().cpu().numpy()
        raw += b"\0" * (-len(raw) % 4)  # where a browser may look at four bytes at once
        index.append([label, kind, list(values.shape), len(raw)])
        raw += values.astype(values.dtype.newbyteorder("<")).tobytes()
    header = json.dumps({**told, "tensors": index}, ensure_ascii=False, separators=(",", ":"))
    return f'{CALL}("{name}",{header},"{base64.b64encode(raw).decode()}");\n'


def scripts(lm: LanguageModel, statistics: Mapping[int, KeyStatistics], plans: Plans) -> dict[str, str]:
    """Every part by the name of its file: `model` first; `covariance` only for methods that invert it.

    About 7 and 2.4 MB. Cost: one `eigh` and one Cholesky factor a layer, d_in³.
    """
    thin, factors = metrics(statistics, recipe(lm.name).threshold)
    tensors = {name: (t, HALF) for name, t in (weights(lm) | thin).items()}
    for name, one in plans.kept.items():
        tensors |= {f"plan.{name}.steps": (one.steps, WHOLE), f"plan.{name}.scale": (one.scale, SINGLE)}
    told = settings(lm, plans.source["contexts"]) | words(lm) | {
        "relations": relations(),
        "pairs": [[r.id.split("|")[0], r.subject, r.target] for r in plans.requests]
    }  # fmt: skip
    return {
        "model": script("model", told, tensors),
        "covariance": script("covariance", {}, {name: (t, HALF) for name, t in factors.items()})
    }


def answers(
    lm: LanguageModel, statistics: Mapping[int, KeyStatistics], plans: Plans, each: int = 5
) -> list[dict[str, Any]]:
    """What the library says of edits of the page, `each` of every method at every λ of `ASKED`, of other requests: what
    the page's own numbers are compared with.

    γ, β and the feasible interval before, and after the edit the likeliest next tokens of the prompt with their
    probabilities; of the first of each also the key and the gate at the last layer. Cost: about 0.14 s an edit.
    """
    found = []
    for turn, (method, strength) in enumerate(ASKED):
        own = editor(method, strength, plans.source["contexts"])
        state, layer = own.init(lm, statistics), own.layers[-1]
        places = [(turn * each + i) % len(plans.requests) for i in range(each)]
        requests = [plans.requests[place] for place in places]
        before = diagnose(lm, requests, own, state)
        for i, (place, request, seen) in enumerate(zip(places, requests, before, strict=True)):
            edit = edited(lm, plans, place, method, own, state)
            with edit.applied(lm):
                likeliest = next_token(lm, request.text).topk(LIKELIEST)
            one = {"place": place, "method": method, "strength": strength, "gamma": seen.association}
            one |= {"beta": seen.attenuation, "lower": seen.lower, "upper": seen.upper if own.noise else None}
            one["after"] = list(zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True))
            if not i:
                rows = Rows.of(lm.tokenizer, [request], state.contexts)
                key = own.reading.reader(lm, rows, layer).read(layer).keys[0]
                one |= {"key": _short(key), "gate": _short(edit.updates[-1].right[0])}
            found.append(one)
    return found


def _short(vector: Tensor) -> list[float]:
    return [float(f"{x:.6g}") for x in vector.tolist()]
