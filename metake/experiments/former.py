"""What runs of earlier versions recorded, so that they can still be gone on with."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from metake.editing.published import is_published
from metake.editing.statistics import Statistics, digest_of, documents, statistics, token_rows
from metake.language.model import LanguageModel


def _digest(lm: LanguageModel, text: str, layers: Sequence[int], tokens: int | None) -> str:
    """The digest of key statistics as edits recorded it while all layers were one file: over their tokens and weights.

    lm: unedited. Cost: the text is read as tokens, and every weight up to the last layer hashed.
    """
    config = {
        k: v for k, v in lm.model.config.to_diff_dict().items() if k not in ("_name_or_path", "transformers_version")
    }
    rows, layers = token_rows(lm, documents(text), tokens, pieces=Path(text).is_file()), sorted(layers)
    told = json.dumps(["v2", layers, str(lm.dtype), config, rows], sort_keys=True, default=str)
    digest = hashlib.sha256(told.encode())
    later = {id(t) for block in lm.blocks[layers[-1] + 1 :] for t in block.state_dict(keep_vars=True).values()}
    for name, tensor in lm.model.base_model.state_dict(keep_vars=True).items():
        if id(tensor) not in later:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def statistics_of(
    lm: LanguageModel, text: str, layers: Sequence[int], tokens: int | None, recorded: str
) -> Statistics:
    """The key statistics of a run whose edits recorded a digest (empty: of none yet): those of all of its text if it
    was begun when that was the default."""
    asked = recorded and tokens is None and layers and not is_published(text)
    if asked and recorded != digest_of(lm, text, layers, None):
        if recorded in (digest_of(lm, text, layers, math.inf), _digest(lm, text, layers, None)):
            return statistics(lm, text, layers=layers, tokens=math.inf)
    return statistics(lm, text, layers=layers, tokens=tokens)


def same_statistics(
    lm: LanguageModel, recorded: str, found: str, text: str, layers: Sequence[int], tokens: int | None
) -> bool:
    """Whether the digest that an edit recorded is that of these key statistics, `found`, or was once."""
    if recorded == found or not layers or is_published(text):  # which is younger than those digests
        return recorded == found
    return recorded == _digest(lm, text, layers, tokens)
