"""One fact, before and after its edit."""

from __future__ import annotations

import time
from typing import Any

import pandas as pd
import torch

from metake import methods
from metake.algebra.update import Edit
from metake.data.requests import EditRequest
from metake.editing.statistics import statistics
from metake.language.model import LanguageModel, load
from metake.language.tokens import encode, pad, seam
from metake.scoring.evaluation import read


@torch.no_grad()
def next_words(lm: LanguageModel, prompt: str, count: int = 5, given: str | None = None) -> list[tuple[str, float]]:
    """The most probable next tokens after a prompt, up to its seam (`tokens.seam`), with their probabilities."""
    ids = encode(lm.tokenizer, seam(prompt, given)[0])
    at = torch.tensor([len(ids) - 1], device=lm.device)
    best = torch.softmax(lm.logits(pad([ids], lm.device), torch.zeros_like(at), at).double(), -1)[0].topk(count)
    return [(lm.tokenizer.decode(i), p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def compare(lm: LanguageModel, edit: Edit, request: EditRequest) -> str:
    """What the model says after the request's prompt, before and after the edit, as two lines."""
    before = next_words(lm, request.text, given=request.seam)
    with edit.applied(lm):
        after = next_words(lm, request.text, given=request.seam)
    asked = request.prompt.replace("{}", request.subject)
    lines = [
        f"{when:<6} {asked} …  " + "  ".join(f"{w!r} {p:.3f}" for w, p in words)
        for when, words in (("before", before), ("after", after))
    ]
    return "\n".join(lines)


def quickstart(
    model: str = "tiny",
    method: str = "metake",
    prompt: str = "The capital of {} is",
    subject: str = "France",
    target: str = "Rome",
    truth: str = "Paris",
    paraphrase: str = "Anyone who looks for the capital city of {} should travel to",
    others: tuple[tuple[str, str], ...] = (("Germany", "Berlin"), ("Italy", "Rome")),
    text: str = "embedded",
    text_tokens: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Edit one fact and read probabilities before, during and after.

    Returns one row per (probe, answer): probability p(answer) = exp(mean log-probability) `before`, `after` the edit,
    and `restored` once it was taken back; attrs: seconds of the edit, whether the restored weights are bit-identical,
    and of the last edited layer the norms of what was planned and realized.
    """
    lm = load(model)
    editor = methods.method(method, model, seed=seed)
    found = statistics(lm, text, layers=editor.layers, tokens=text_tokens)
    request = EditRequest(prompt, subject, target, "quickstart")
    forms = (("edited prompt", prompt), ("paraphrase", paraphrase))
    asked = [(kind, form.replace("{}", subject), answer) for kind, form in forms for answer in (target, truth)]
    asked += [("another subject", prompt.replace("{}", other), answer) for other, answer in others]

    def probabilities() -> list[float]:
        return torch.tensor([r.log_p for r in read(lm, [(p, a) for _, p, a in asked])]).exp().tolist()

    start = time.perf_counter()
    edit = editor.edit(lm, [request], found)
    seconds = time.perf_counter() - start
    before = probabilities()
    with edit.applied(lm):
        after = probabilities()
    frame = pd.DataFrame(
        [
            {"probe": kind, "prompt": p, "answer": a, "before": b, "after": c, "restored": d}
            for (kind, p, a), b, c, d in zip(asked, before, after, probabilities(), strict=True)
        ]
    )
    last = edit.record.layers.get(str(editor.layers[-1]), {})
    frame.attrs |= {"seconds": seconds, "restored_exactly": _identical(lm, edit), "provenance": provenance(lm, edit)}
    frame.attrs |= {name: round(last[name], 2) if name in last else None for name in ("planned", "realized")}
    return frame


def _identical(lm: LanguageModel, edit: Edit) -> bool:
    return all(lm.digest(module) == digest for module, digest in edit.record.weights.items())


def provenance(lm: LanguageModel, edit: Edit) -> dict[str, Any]:
    """What a page says of the edit that it shows; the model by the same digest as in a recording (`made`)."""
    record = edit.record
    digests = {
        "model_digest": lm.digest(lm.write_path(lm.depth - 1)), "statistics_digest": record.statistics_digest,
        "data_digest": record.requests_digest
    }
    return {
        "model": record.base["id"], **{k: record.base[k] for k in ("origin", "revision", "note", "dtype", "device")},
        **digests, "seed": record.seed, "versions": record.versions
    }
