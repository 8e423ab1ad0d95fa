"""Beyond the paper: how much text key statistics need, until what is edited with them no longer changes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from metake import methods
from metake.algebra.geometry import InverseCovariance, KeyStatistics, NullSpace
from metake.editing.editor import Editor
from metake.editing.keys import KeyReader
from metake.editing.record import describe
from metake.editing.statistics import Statistics, statistics, stream, token_rows
from metake.editing.texts import documents
from metake.experiments.cases import read_cases, select
from metake.experiments.decision import Decision, all_of, interval, opposite, undecided, with_interval
from metake.experiments.kept import kept
from metake.experiments.studies.comparison import labelled
from metake.experiments.studies.study import Batch, likelihood
from metake.language.model import LanguageModel, load
from metake.report.style import style
from metake.scoring.evaluation import evaluate
from metake.support.errors import ParameterError, StatisticsError

METHODS = ("memit", "alphaedit")
MULTIPLES = (1, 2, 5, 10, 20, 50)
"""Tokens for each dimension of a key: where the statistics are looked at, before all of the text is read."""
CLAIMED = 10
"""What is said to be enough for MEMIT (Gupta et al. 2025)."""
PROPOSED = 50
"""What was to be taken of a text by default if its verdict holds: `statistics.ENOUGH`."""
MARKS = (CLAIMED, PROPOSED)  # lines of the drawing
LEAST = 10.0  # points of a score: what counts as a change
SCORES = ("efficacy", "generalization", "specificity")


def text_needed(
    model: str = "tiny", multiples: Sequence[int] = MULTIPLES, data: str = "facts", edits: int = 30, seed: int = 0,
    text: str = "embedded", text_tokens: int | None = None, out: str | Path | None = None
) -> pd.DataFrame:
    """MEMIT and AlphaEdit with the key statistics of growing beginnings of one text, on one batch of requests.

    multiples: tokens for each dimension of a key, of which those are left out that the text does not have twice over:
    what is compared with all of the text must not be most of it. text, text_tokens: as `statistics` has them;
    out: a folder that keeps what is finished.

    Rows by "multiple" (of all of the text: what that comes to), "tokens" and "method", of two kinds. One per edited
    "layer", beside all of the text:
    rank         of P, the projector onto eigenvectors of C under the threshold                  (AlphaEdit eq. 12–13)
    angle, largest   mean and largest principal angle between the two null spaces, degrees
    open         tr(P C) / tr(C), C of all of the text: the part of what it uses that P leaves open to edits, percent
    distance     ‖C − C_all‖ / ‖C_all‖ by Frobenius, percent                                             (of MEMIT)
    turned       angle between Q k and Q_all k, the direction that a request writes to, its mean over requests, degrees
    One per request ("id"): the scores as shares, and log p of the target, nats; "refused": these statistics were
    refused as singular and nothing was written.
    Cost: a pass over the beginning, beside the statistics of all of the text, which are cached; a solve and an
    evaluation for each amount and method, Stage I once.
    """
    lm = load(model)
    editors = {name: methods.method(name, model) for name in METHODS}
    layers = sorted({layer for editor in editors.values() for layer in editor.layers})
    whole = statistics(lm, text, layers, text_tokens or math.inf)
    width, total = whole[layers[0]].dim, whole[layers[0]].count
    wanted = [m for m in sorted(multiples) if m * width <= total / 2]
    if not wanted:
        raise ParameterError(
            f"{total} tokens of text are less than twice {min(multiples)} for each of {width} dimensions of a key: "
            "there is nothing to compare; give more text"
        )
    rows = token_rows(lm, documents(text), wanted[-1] * width, pieces=Path(text).is_file())
    batch = Batch.of(lm, whole, select(lm, read_cases(data), edits, seed))
    beside = _Whole(lm, batch, editors)
    amounts, found = [*wanted, round(total / width)], []
    for multiple, given in zip(amounts, (*growing(lm, rows, layers, [m * width for m in wanted], out), whole)):
        told = _told(lm, batch, editors, beside, text, given)
        for row in kept(out, told, lambda given=given: beside.rows(given)):
            found.append({"multiple": multiple, "tokens": given[layers[0]].count} | row)
    frame = pd.DataFrame(found)
    frame.attrs["settings"] = {"edits": edits, "batch": edits, "seeds": [seed]}
    return frame


def growing(
    lm: LanguageModel, rows: Sequence[tuple[int, ...]], layers: Sequence[int], amounts: Iterable[int],
    out: str | Path | None = None
) -> Iterator[dict[int, KeyStatistics]]:
    """Key statistics of the first rows that have each amount of tokens, or a few more."""
    ends = np.cumsum([len(row) for row in rows])
    places = [int(np.searchsorted(ends, amount)) + 1 for amount in amounts]
    begun: dict[int, KeyStatistics] = {}
    for first, end in zip([0, *places[:-1]], places, strict=True):
        more = _stretch(lm, list(rows[first:end]), list(layers), out)
        begun = {
            i: KeyStatistics(begun[i].moment + one.moment, begun[i].count + one.count) if begun else one
            for i, one in more.items()
        }
        yield begun


def _stretch(
    lm: LanguageModel, rows: list[tuple[int, ...]], layers: list[int], out: str | Path | None
) -> dict[int, KeyStatistics]:
    """Statistics of some rows, kept in a file."""
    digest = hashlib.sha256(repr((lm.base(), lm.digest(lm.write_path(layers[-1])), layers, rows)).encode()).hexdigest()
    file = Path(out or "") / f"{digest[:16]}.safetensors"
    if out and file.is_file():
        return Statistics.load(file, digest)
    found = Statistics(stream(lm, rows, layers, 8192), digest)
    if out:
        found.save(file)
    return found


class _Whole:
    """What every amount is held beside: the requests, their plans and keys, and the metrics of all of the text."""

    def __init__(self, lm: LanguageModel, batch: Batch, editors: dict[str, Editor]):
        self.lm, self.batch, given = lm, batch, batch.statistics
        self.given, first = given, next(iter(editors.values()))
        contexts = first.init(lm, given).contexts
        self.editors = {name: replace(editor, contexts=contexts) for name, editor in editors.items()}
        reader = KeyReader(lm, batch.requests, contexts, first.layers[-1])
        self.keys = {layer: reader.read(layer).keys for layer in sorted(given)}
        self.metrics = {name: {i: e.metric(given[i]) for i in e.layers} for name, e in self.editors.items()}

    def rows(self, given: dict[int, KeyStatistics]) -> list[dict[str, Any]]:
        """Of one amount: a row per method and layer, and one per method and request."""
        found = []
        for name, editor in self.editors.items():
            try:
                metrics = {i: editor.metric(given[i]) for i in editor.layers}
            except StatisticsError:
                metrics = {}
            found += [self._layer(name, i, metrics.get(i), given[i]) for i in editor.layers]
            found += self._requests(name, editor, given if metrics else None)
        return [EMPTY | row for row in found]

    def _layer(
        self, name: str, layer: int, metric: InverseCovariance | NullSpace | None, given: KeyStatistics
    ) -> dict[str, Any]:
        own, all_, keys = {"method": name, "layer": layer}, self.given[layer], self.keys[layer]
        if metric is None:
            return own | {"refused": True}
        theirs = self.metrics[name][layer]
        own["turned"] = float(_degrees(torch.cosine_similarity(metric.apply(keys), theirs.apply(keys))).mean())
        if not isinstance(metric, NullSpace):
            apart = given.covariance - all_.covariance
            return own | {"distance": 100 * float(apart.norm() / all_.covariance.norm())}
        angles = principal_angles(_basis(metric, given), _basis(theirs, all_))
        used = all_.covariance
        left = float(metric.project(used).diagonal().sum() / used.trace())
        return own | {
            "rank": metric.rank, "angle": float(angles.mean()), "largest": float(angles.max()), "open": 100 * left
        }

    def _requests(self, name: str, editor: Editor, given: dict[int, KeyStatistics] | None) -> list[dict[str, Any]]:
        score = self.batch.before
        if given:
            state = editor.init(self.lm, Statistics(given))
            plan = self.batch.plan(editor, state)
            edit, _ = editor.step(self.lm, self.batch.requests, state, planned=plan)
            with edit.applied(self.lm):
                score = evaluate(self.lm, self.batch.cases)
        return [
            {"method": name, "refused": not given, "log_p": likelihood(case)["log_p"]}
            | {key: row[key] for key in ("id", *SCORES)}
            for row, case in zip(score.records(), score.cases, strict=True)
        ]


EMPTY = dict.fromkeys(
    ("method", "layer", "rank", "angle", "largest", "open", "distance", "turned", "id", "log_p", *SCORES)
) | {"refused": False}


def _told(
    lm: LanguageModel, batch: Batch, editors: dict[str, Editor], whole: _Whole, text: str,
    given: dict[int, KeyStatistics]
) -> tuple[Any, ...]:
    """All that the rows of one amount depend on."""
    contexts = next(iter(whole.editors.values())).contexts
    counts = sorted((i, one.count) for i, one in given.items())
    told = [describe(editor) for editor in editors.values()]
    return told, contexts, Path(text).name, whole.given.digest, counts, lm.base(), batch.cases.digest


def _basis(metric: NullSpace, given: KeyStatistics) -> Tensor:
    """U₀, (d_in, rank)."""
    return given._eigh[1][:, : metric.rank]


def principal_angles(one: Tensor, other: Tensor) -> Tensor:
    """Degrees between the spans of orthonormal columns, as many as the smaller has, in ascending order.

    arccos of the singular values of U₁ᵀU₂; by the eigenvalues of its Gram matrix, so that an angle below 1e-6 degrees
    is not told from none.
    """
    overlap = one.T @ other if one.shape[1] <= other.shape[1] else other.T @ one
    return _degrees(torch.linalg.eigvalsh(overlap @ overlap.T).clamp(0, 1).sqrt()).flip(0)


def _degrees(cosines: Tensor) -> Tensor:
    return torch.rad2deg(torch.arccos(cosines.clamp(-1, 1)))


def geometry(records: pd.DataFrame) -> pd.DataFrame:
    """Means over layers, a row an amount: what `text_needed` says of P, of C, and of where requests write to."""
    own = records[records.layer.notna()]
    found = own.groupby(["multiple", "tokens", "method"])[["rank", "angle", "largest", "open", "distance", "turned"]]
    wide = found.mean().unstack("method")
    columns = {
        "rank of P": ("rank", "alphaedit"), "mean angle, °": ("angle", "alphaedit"),
        "largest angle, °": ("largest", "alphaedit"), "left open, %": ("open", "alphaedit"),
        "C differs, %": ("distance", "memit"), "MEMIT turned, °": ("turned", "memit"),
        "AlphaEdit turned, °": ("turned", "alphaedit"),
    }
    table = pd.DataFrame({name: wide[place] for name, place in columns.items()}).reset_index()
    # below a thousandth of a degree there is only rounding
    return labelled(table.round({name: 3 for name in columns if name.endswith("°")}), records)


def scores(records: pd.DataFrame) -> pd.DataFrame:
    """Percent, and log p of the target, by amount and method; refused: nothing was written."""
    own = records[records.id.notna()]
    grouped = own.groupby(["multiple", "tokens", "method"], sort=False)
    table = 100 * grouped[list(SCORES)].mean()
    table["log p"], table["refused"] = grouped.log_p.mean(), grouped.refused.any()
    return labelled(table.reset_index(), records)


def curves(records: pd.DataFrame) -> pd.DataFrame:
    """`scores`, beside each the `geometry` of the same amount."""
    return labelled(scores(records).merge(geometry(records), on=["multiple", "tokens"]), records)


def wide(found: pd.DataFrame) -> pd.DataFrame:
    """`differences` with a column a score, each with its interval in brackets: for a table."""
    texts = [with_interval(r.difference, r.low, r.high) for r in found.itertuples()]
    table = found.assign(text=texts).pivot(index=["method", "multiple"], columns="score", values="text")
    return labelled(table[list(SCORES)].reset_index().rename_axis(columns=None), found)


def differences(records: pd.DataFrame, draws: int = 4000, seed: int = 0) -> pd.DataFrame:
    """Scores with each amount minus those with all of the text, points, on the same requests, with 95 % bootstrap
    intervals over requests. A row per method, amount and score."""
    own, rows = records[records.id.notna()], []
    for method, group in own.groupby("method", sort=False):
        most, generator = group.multiple.max(), np.random.default_rng(seed)
        whole = group[group.multiple == most].set_index("id")
        places = generator.integers(len(whole), size=(draws, len(whole)))
        for multiple, part in group[group.multiple < most].groupby("multiple"):
            part = part.set_index("id").loc[whole.index]
            for score in SCORES:
                apart = 100 * (part[score] - whole[score]).to_numpy(float)
                low, high = np.percentile(apart[places].mean(1), [2.5, 97.5])
                rows.append(
                    {"method": method, "multiple": multiple, "score": score, "requests": len(apart),
                     "difference": apart.mean(), "low": low, "high": high}
                )  # fmt: skip
    return labelled(pd.DataFrame(rows), records)


def _enough(own: pd.DataFrame, multiple: int) -> Decision:
    """Are all scores less than LEAST points from those with all of the text, to either side, by their intervals?"""
    found = own[own.multiple == multiple]
    if found.empty:
        return undecided(f"no statistics of {multiple} tokens for each dimension are among the records")
    requests = found.requests.max()
    # of n requests of which none changes, 3/n may still change, at 95 %
    sees = Decision(True if 300 / requests <= LEAST else None, LEAST * requests / 300, "sampling")
    sides = (
        side
        for r in found.itertuples()
        for side in (
            opposite(interval(r.score, r.difference, r.low, r.high, LEAST)),
            interval(r.score, r.difference, r.low, r.high, -LEAST),
        )
    )
    return all_of([*sides, sees]).quiet()


def judge(found: pd.DataFrame, method: str) -> dict[str, Any]:
    """Holds if with ten tokens for each dimension of a key no score lies ten points or more from the one with all of
    the text, by 95 % intervals over requests, and with some smaller amount one does; does not hold if with ten one
    does, or with no smaller amount that was tried; else it is inconclusive.

    found: `differences`. Fixed before anything was recorded.
    """
    own = found[found.method == method]
    fewer = [_enough(own, m) for m in sorted(own.multiple.unique()) if m < CLAIMED]
    needed = opposite(all_of(fewer)) if fewer else undecided("no smaller amount was tried")
    said = [f"{m} tokens for each dimension: {_farthest(part)}" for m, part in own.groupby("multiple")]
    both = all_of([_enough(own, CLAIMED), needed])
    return both.quiet().verdict("farthest from all of the text, in points: " + "; ".join(said))


def judge_default(found: pd.DataFrame) -> dict[str, Any]:
    """Holds if with fifty tokens for each dimension of a key, or with the largest amount below that was tried, no
    score of MEMIT or AlphaEdit lies ten points or more from the one with all of the text, by 95 % intervals over
    requests; does not hold if one does; else it is inconclusive.
    """
    multiple = found.multiple[found.multiple <= PROPOSED].max()
    parts = {method: own for method, own in found[found.multiple == multiple].groupby("method", sort=False)}
    said = "; ".join(f"{style(method).name}: {_farthest(own)}" for method, own in parts.items())
    decision = all_of(_enough(own, multiple) for own in parts.values()).quiet()
    return decision.verdict(f"farthest from all of the text with {multiple}, in points: {said}")


def _farthest(own: pd.DataFrame) -> str:
    far = own.loc[own.difference.abs().idxmax()]
    return f"{far.score} {with_interval(far.difference, far.low, far.high)}"
