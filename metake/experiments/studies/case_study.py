"""MetaKE v3 App. D.6: what the model writes after the same edit by every method, and where the new object appears."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from metake import methods as known
from metake.data.requests import EditCase
from metake.editing.editor import Editor
from metake.editing.record import describe, digest_of
from metake.editing.statistics import statistics
from metake.experiments.cases import read_cases, select
from metake.experiments.decision import all_of, apart, undecided
from metake.experiments.kept import kept
from metake.experiments.runs import Unedited
from metake.language.generation import sample
from metake.language.model import LanguageModel, load
from metake.language.tokens import encode
from metake.report.studies.generations import whole_words
from metake.report.style import style
from metake.scoring.evaluation import read, require_prompts
from metake.scoring.text_metrics import ngram_entropy
from metake.support.errors import ParameterError

EDITED, OPEN = "the edited prompt", "a generation prompt"
NAMED = ("memit", "alphaedit", "blue", "sphere")  # whom the paper compares MetaKE with


def case_study(
    model: str = "tiny",
    methods: Sequence[str] = ("memit", "alphaedit", "metake"),
    data: str = "facts",
    edits: int = 10,
    shown: int = 3,
    seed: int = 0,
    text: str = "embedded",
    text_tokens: int | None = None,
    length: int = 40,
    out: str | Path | None = None,
) -> pd.DataFrame:
    """One batch of edits by every method, each on the unedited model, and the continuations that it then writes.

    Each case is asked twice: its own prompt, as the paper does, and its first generation prompt.
    Random numbers depend on seed and case alone, so that methods differ by their edits only. length: tokens of a text,
    prompt included; shown: how many cases a page prints, the first of the draw by `seed`, whatever came out.
    Methods that plan alike share Stage I.
    out: a folder that keeps what every finished method wrote; None: nothing is kept.

    Returns one row per method ("pre-edit" first), case and prompt: method, id, shown, asked, prompt, text (after the
    prompt), target, old, appears and old_appears (as a whole word, in any case), p_target and p_old after the edited
    prompt, success (p_target > p_old), entropy (bits, `ngram_entropy` of prompt and text). attrs["restored_exactly"]:
    the unedited weights came back bit for bit after each method.
    Raises ParameterError for cases without generation prompts or without a true object (ZsRE), shown > edits, or a
    length that leaves nothing to write.
    """
    if not 1 <= shown <= edits:
        raise ParameterError(f"shown must be from 1 to edits = {edits}; found {shown}")
    lm, source = load(model), read_cases(data)
    cases = select(lm, source, edits, seed)
    require_prompts(cases)
    requests = [c.request for c in cases]
    told = (model, lm.digest(lm.write_path(0)), digest_of(requests), shown, seed, text, text_tokens, length)
    rows = kept(out, ("pre-edit", *told), lambda: _written(lm, "pre-edit", cases, shown, seed, length))
    unedited, restored, shared = _digests(lm), True, Unedited()

    def edited(method: str, editor: Editor) -> list[dict[str, Any]]:
        state = editor.init(lm, statistics(lm, text, layers=editor.layers, tokens=text_tokens))
        edit = editor.finished(lm, *editor.step(lm, requests, state, shared.plan(lm, editor, state, requests)))
        with edit.applied(lm):
            return _written(lm, method, cases, shown, seed, length)

    for method in methods:
        editor = known.method(method, model, seed=seed)
        rows += kept(
            out, (method, describe(editor), *told), lambda method=method, editor=editor: edited(method, editor)
        )
        restored &= _digests(lm) == unedited
    frame = pd.DataFrame(rows)
    settings = {
        "dataset": f"{Path(data).name} sha256:{source.digest[:16]}", "edits": edits, "batch": edits, "seed": seed,
        "length": length
    }
    frame.attrs |= {"restored_exactly": restored, "settings": settings}
    return frame


def _digests(lm: LanguageModel) -> list[str]:
    return [lm.digest(lm.write_path(layer)) for layer in range(lm.depth)]


def _written(
    lm: LanguageModel, method: str, cases: Sequence[EditCase], shown: int, seed: int, length: int
) -> list[dict[str, Any]]:
    prompts = [
        {EDITED: c.request.text, OPEN: next(p.prompt for p in c.probes if p.kind == "generation")} for c in cases
    ]
    asked = [(place, kind, prompt) for place, both in enumerate(prompts) for kind, prompt in both.items()]
    if (longest := max(len(encode(lm.tokenizer, prompt)) for *_, prompt in asked)) >= length:
        raise ParameterError(
            f"length, prompt included, must exceed the longest prompt's {longest} tokens; found {length}"
        )
    texts = sample(
        lm, [prompt for *_, prompt in asked], length, seed=seed,
        streams=[f"{cases[i].request.id}/{kind}" for i, kind, _ in asked]
    )
    old = [next(p.rival for p in c.probes if p.kind == "efficacy") for c in cases]
    requests = [c.request for c in cases]
    pairs = [(r.text, answer, r.seam) for r, o in zip(requests, old, strict=True) for answer in (r.target, o)]
    p = [math.exp(r.log_p) for r in read(lm, pairs)]
    rows = []
    for (i, kind, prompt), whole in zip(asked, texts, strict=True):
        request, text = cases[i].request, continuation_of(prompt, whole)
        row = {
            "method": method, "id": request.id, "shown": i < shown, "asked": kind, "prompt": prompt, "text": text,
            "target": request.target, "old": old[i]
        }
        row |= {"appears": appears(request.target, text), "old_appears": appears(old[i], text)}
        rows.append(
            row
            | {
                "p_target": p[2 * i], "p_old": p[2 * i + 1], "success": p[2 * i] > p[2 * i + 1],
                "entropy": ngram_entropy(whole)
            }
        )
    return rows


def continuation_of(prompt: str, text: str) -> str:
    """What a generated text has after the prompt; all of it if the tokenizer gives the prompt back otherwise."""
    return text.removeprefix(unicodedata.normalize("NFKD", prompt))


def appears(answer: str, text: str) -> bool:
    """Whether an object stands in a text as a whole word, capitals or not: "Bulgaria" does not stand in "Bulgarian"."""
    return whole_words(answer).search(text) is not None


def summarize(records: pd.DataFrame, asked: str = EDITED) -> pd.DataFrame:
    """Per method, over all cases: share of continuations with the target, with its 95 % interval (Wilson), and with the
    old object; share of successful edits; mean entropy in bits, which repetition lowers."""
    rows = []
    for method, group in records[records.asked == asked].groupby("method", sort=False):
        low, high = wilson(int(group.appears.sum()), len(group))
        row = {
            "method": method, "cases": len(group), "target": 100 * group.appears.mean(), "low": 100 * low,
            "high": 100 * high
        }
        rows.append(
            row
            | {
                "old_object": 100 * group.old_appears.mean(), "efficacy": 100 * group.success.mean(),
                "entropy": group.entropy.mean()
            }
        )
    frame = pd.DataFrame(rows)
    frame.attrs = dict(records.attrs)
    return frame


def by_prompt(records: pd.DataFrame) -> pd.DataFrame:
    """`summarize` after the edited and after the generation prompts, column `asked`."""
    frame = pd.concat([summarize(records, asked).assign(asked=asked) for asked in (EDITED, OPEN)], ignore_index=True)
    frame = frame[["asked", *(c for c in frame if c != "asked")]]
    frame.attrs = dict(records.attrs)
    return frame


def wilson(hits: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` cases; not of width zero where all or none hit."""
    if not 0 <= hits <= count or not count:
        raise ParameterError(f"a share needs 0 ≤ hits ≤ count, and count ≥ 1; found {hits} of {count}")
    share, scale = hits / count, 1 + z * z / count
    middle, half = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - half) / scale if hits else 0.0, (middle + half) / scale if hits < count else 1.0


def judge(summary: pd.DataFrame, one: str = "metake", rivals: Sequence[str] = NAMED) -> dict[str, Any]:
    """MetaKE's continuations hold the new object more often than every other method's that the paper names:
    holds if the interval of its share lies above all others', does not hold if it lies below one; inconclusive if they
    overlap, or one was not run."""
    own = summary.set_index("method")
    absent, rivals = [r for r in rivals if r not in own.index], [r for r in rivals if r in own.index]
    if one not in own.index or not rivals:
        raise ParameterError(f"the claim compares {one!r} with one of {', '.join(NAMED)}; found {', '.join(own.index)}")
    shares = {m: own.loc[m, ["target", "low", "high"]].tolist() for m in (one, *rivals)}
    parts = [f"{style(m).name} {share:.0f} % [{low:.0f}, {high:.0f}]" for m, (share, low, high) in shares.items()]
    parts += [f"{style(m).name} was not run" for m in absent]
    found = all_of(
        [apart(f"{style(m).name}'s share", shares[one], shares[m]) for m in rivals]
        + [undecided(f"{style(m).name} was not run") for m in absent]
    )
    told = f"continuations with the new object, {own.cases[one]:.0f} cases: " + ", ".join(parts)
    return found.quiet().verdict(told)
