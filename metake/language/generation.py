"""Sampling that does not depend on how prompts are batched: every draw is a function of (seed, prompt, position).

Used for the family's context templates (MEMIT) and for the fluency and consistency metrics.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterator, Sequence
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
    first, draws = pad(ids, lm.device), sent(np.array(uniforms), lm.device)

    def drawn(logits: Tensor, step: Padded) -> Tensor:
        best, at = torch.softmax(logits.double(), -1).topk(min(top_k, logits.shape[-1])), step.mask.shape[1]
        mass = best.values.cumsum(-1)
        pick = (mass < draws[:, at, None] * mass[:, -1:]).sum(-1, keepdim=True).clamp_max(mass.shape[1] - 1)
        return best.indices.gather(1, pick)

    steps = _written(lm, first, length - first.ids.shape[1], drawn)
    return torch.cat([first.ids, *(new for new, _ in steps)], 1)


def _written(
    lm: LanguageModel, step: Padded, count: int, choose: Callable[[Tensor, Padded], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` tokens after rows that end in one column, (rows, 1) each, and the logits from which each is chosen."""
    cache, rows = DynamicCache(), range(len(step.ids))
    for _ in range(count):
        logits = lm.logits(step, rows, [step.ids.shape[1] - 1] * len(rows), cache)
        new = choose(logits, step)
        yield new, logits
        mask = Counted.of(torch.cat([step.mask, torch.ones_like(new)], 1), step.mask.sum() + len(rows))
        step = Padded(new, mask, step.positions[:, -1:] + 1)


def greedy(
    lm: LanguageModel, rows: Sequence[tuple[int, ...]], length: int, tokens: int = 8192
) -> list[tuple[str, Tensor]]:
    """Per token row its continuation as text, `length` most probable tokens or to the end of text, and the first
    token's log-probabilities; tokens: of one micro-batch, which does not change the result."""

    def written(size: int) -> list[tuple[str, Tensor]]:
        found: list[tuple[str, Tensor]] = [("", torch.empty(0))] * len(rows)
        for group in progress(lm.groups([len(row) for row in rows], size, length), "answer"):
            said, first = [], None
            step = _aligned([rows[i] for i in group], lm.device)
            for new, logits in _written(lm, step, length, lambda logits, _: logits.argmax(-1, keepdim=True)):
                first = logits if first is None else first
                said.append(new)
            log_p = torch.log_softmax(first.to(torch.promote_types(first.dtype, torch.float32)), -1).cpu()
            for i, ids, own in zip(group, torch.cat(said, 1).tolist(), log_p, strict=True):
                found[i] = (lm.tokenizer.decode(_until_end(lm, ids), skip_special_tokens=True), own)
        return found

    return halving(written, min(tokens, lm.room(1, gradients=False)), lm.fitted)


def _aligned(rows: Sequence[tuple[int, ...]], device: torch.device) -> Padded:
    """Rows that end in one column, padded on the left: what follows continues all of them. Padding is masked."""
    lengths, width = [len(row) for row in rows], max(map(len, rows))
    ids = sent([(*[0] * (width - len(row)), *row) for row in rows], device, torch.long)
    positions = torch.arange(width, device=device) - (width - sent(lengths, device))[:, None]
    return Padded(ids, Counted.of((positions >= 0).long(), sum(lengths)), positions.clamp_min(0))


def _until_end(lm: LanguageModel, ids: list[int]) -> list[int]:
    end = getattr(getattr(lm.model, "generation_config", None), "eos_token_id", None)
    ends = set(end) if isinstance(end, list) else {end, lm.tokenizer.eos_token_id}
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


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
