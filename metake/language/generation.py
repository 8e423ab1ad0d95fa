"""Sampling that does not depend on how prompts are batched: every draw is a function of (seed, prompt, position).

Used for the family's context templates (MEMIT) and for the fluency and consistency metrics.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from metake.language.model import LanguageModel
from metake.language.tokens import Counted, Padded, encode, pad, seam
from metake.support.errors import ParameterError
from metake.support.machine import halving, sent, start_cost
from metake.support.progress import progress

CONTEXT_WORDS = ("The", "Therefore", "Because", "I", "You")


def _uniforms(seed: int, stream: str, count: int) -> np.ndarray:
    """`count` uniform numbers of a counter-based generator (Philox) keyed by seed and stream."""
    digest = hashlib.sha256(f"{seed}:{stream}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(count)


@LanguageModel.entry()
def sample(
    lm: LanguageModel, prompts: Sequence[str], length: int, top_k: int = 5, seed: int = 0, rows: int | None = None,
    streams: Sequence[str] | None = None
) -> list[str]:
    """One continuation of each prompt by top-k sampling, `length` tokens in all, prompt included (up to its seam).

    Softmax, the k largest probabilities renormalized, no temperature, no stop token (the family's protocol). rows:
    sequences run together (default: as many as pay here), which does not change the result; streams: names of the
    random streams, one a prompt (default: the prompts, so that equal prompts get equal texts). Returns the whole texts,
    NFKD-normalized, without special tokens. Raises NumericalError if the model gives numbers that are not finite.
    """
    ids = [encode(lm.tokenizer, seam(p)[0]) for p in prompts]
    alike = [[i for i, row in enumerate(ids) if len(row) == tokens] for tokens in dict.fromkeys(map(len, ids))]
    uniforms = [_uniforms(seed, stream, length) for stream in (prompts if streams is None else streams)]

    def written(size: int) -> list[str]:
        texts = [""] * len(ids)
        groups = [same[k : k + size] for same in alike for k in range(0, len(same), size)]
        for group in progress(groups, "generate"):
            found = _continue(lm, [ids[i] for i in group], [uniforms[i] for i in group], length, top_k).tolist()
            for i, row in zip(group, found, strict=True):
                text = lm.tokenizer.decode(row, skip_special_tokens=True)
                texts[i] = unicodedata.normalize("NFKD", text).replace("\n\n", " ")
        return texts

    return halving(written, rows or start_cost(lm.device), lm.fitted)


def _continue(
    lm: LanguageModel, ids: Sequence[Sequence[int]], uniforms: list[np.ndarray], length: int, top_k: int
) -> Tensor:
    """Token rows continued to `length`; all prompts of one length, so that nothing is padded."""
    done = new = pad(ids, lm.device).ids
    draws, cache = sent(np.array(uniforms), lm.device), DynamicCache()
    for t in range(done.shape[1], length):
        positions = torch.arange(t - new.shape[1], t, device=lm.device).expand(len(ids), -1)
        step = Padded(new, Counted.of(torch.ones_like(done), done.numel()), positions)
        logits = lm.logits(step, range(len(ids)), [new.shape[1] - 1] * len(ids), cache)
        best = torch.softmax(logits.double(), -1).topk(min(top_k, logits.shape[-1]))
        mass = best.values.cumsum(-1)
        pick = (mass < draws[:, t, None] * mass[:, -1:]).sum(-1, keepdim=True).clamp_max(mass.shape[1] - 1)
        new = best.indices.gather(1, pick)
        done = torch.cat([done, new], 1)
    return done


@dataclass(frozen=True)
class ContextRule:
    """Which openings stand before a prompt, and how keys are averaged over them.

    lengths: tokens of an opening, its first word and BOS included; each: openings of a length for each first word.
    flat: k is the plain mean over all templates (ROME), else ½ plain prompt + ½ mean of the others (MEMIT).
    """

    lengths: tuple[int, ...] = (10,)
    each: int = 1
    flat: bool = False

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1 or self.each < 1:
            raise ParameterError(
                f"lengths must be at least one positive number, and each ≥ 1; found {self.lengths}, {self.each}"
            )


def context_templates(lm: LanguageModel, rule: ContextRule = ContextRule(), seed: int = 0) -> tuple[str, ...]:
    """The family's context templates: "{}", and sampled openings of five first words followed by ". {}" (MEMIT, ROME).

    Braces in a sampled text become spaces.
    """
    openings: list[str] = []
    for number, (length, _) in enumerate(product(rule.lengths, range(rule.each))):
        streams = [f"{word}/{number}" if number else word for word in CONTEXT_WORDS]
        openings += sample(lm, CONTEXT_WORDS, length, seed=seed, streams=streams)
    return ("{}", *(text.replace("{", " ").replace("}", " ") + ". {}" for text in openings))
