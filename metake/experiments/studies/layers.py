"""Which layers of a model to edit: a few facts written at every window of layers, with causal tracing beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from metake import methods
from metake.data.requests import Cases, EditRequest
from metake.editing.recipes import recipe
from metake.editing.statistics import statistics
from metake.experiments.borrowed import borrowed
from metake.experiments.cases import read_cases, select
from metake.experiments.studies.comparison import METRICS, harmonic_mean
from metake.language.capture import hidden, reading, rewrap
from metake.language.model import LanguageModel, load
from metake.language.tokens import Row, encode, pad, rewriting_rows
from metake.report.shown import plain
from metake.scoring.evaluation import evaluate
from metake.support.errors import NumericalError, ParameterError, StatisticsError
from metake.support.progress import progress

SCORES = list(METRICS[:3])
KNOWN = 0.1  # probability of the true answer from which a model knows a fact
OWN = ("layers", "rome_layer", "blue_layers")


def layer_sweep(
    model: str = "tiny", method: str = "alphaedit", data: str = "facts", edits: int = 10, width: int | None = None,
    stride: int | None = None, first: int = 0, last: int | None = None, like: str | None = None,
    text: str = "embedded", text_tokens: int | None = None, dtype: str | None = None, device: str | None = None,
    seed: int = 1,
) -> pd.DataFrame:  # fmt: skip
    """One batch of `edits` facts at every window of `width` layers between `first` and `last`, each from the unedited
    model.

    width: default 5, at most half of the layers; stride: between windows, default 1 to 16 layers, then more; last:
    default the last but one; like: whose recipe gives the other numbers, default the model's own, or "default".
    Returns a row per window: layers, the scores in percent, "score" (their harmonic mean), relative_update (‖Δ‖/‖W‖ of
    the last layer), "restored" (see `traced`), "flaw" (why nothing could be written there, or ""); attrs: what was
    asked for, "before" (the unedited model's scores).
    Raises ParameterError if no window fits. Cost: an edit and an evaluation a window, and the key statistics of every
    layer in one.
    """
    like = like or _own(model)
    lm = load(model, dtype, device)
    cases = select(lm, read_cases(data), edits, seed)
    windows = _windows(lm.depth, width, stride, first, last)
    shares = traced(lm, cases, windows, seed=seed)
    before, rows = evaluate(lm, cases), []
    for window, share in zip(progress(windows, "layers"), shares, strict=True):
        with borrowed(model, like, window):
            editor = methods.method(method, model, seed=seed)
        row = {"layers": window, **dict.fromkeys(SCORES, 0.0), "relative_update": 0.0, "restored": share, "flaw": ""}
        try:
            found = statistics(lm, text, layers=editor.layers, tokens=text_tokens)
            edit = editor.edit(lm, [case.request for case in cases], found)
            with edit.applied(lm):
                row |= {name: value for name, value in evaluate(lm, cases).metrics.items() if name in SCORES}
            row["relative_update"] = edit.record.layers[str(editor.layers[-1])]["relative_update"]
        except (StatisticsError, NumericalError) as error:  # of this window alone
            row["flaw"] = str(error)
        rows.append(row)
    if all(row["flaw"] for row in rows):
        raise StatisticsError(f"nothing could be written at any window of layers; at the first: {rows[0]['flaw']}")
    frame = pd.DataFrame(rows)
    frame["score"] = harmonic_mean(frame)
    frame.attrs |= {
        "model": model, "like": like, "method": method, "edits": edits, "data": data,
        "before": {name: before.metrics[name] for name in SCORES},
    }  # fmt: skip
    return frame


def _own(model: str) -> str:
    try:
        recipe(model)
    except ParameterError:
        return "default"
    return model


def _windows(
    depth: int, width: int | None, stride: int | None, first: int, last: int | None
) -> list[tuple[int, ...]]:
    last, width = depth - 2 if last is None else last, width or min(5, max(1, depth // 2))
    if not 0 <= first <= last < depth - 1 or width > last - first + 1:
        raise ParameterError(
            f"no window of {width} layers fits between {first} and {last}; the model has blocks 0 to {depth - 1}, of "
            "which the last cannot be edited"
        )
    return [tuple(range(i, i + width)) for i in range(first, last - width + 2, stride or max(1, round(depth / 16)))]


@torch.no_grad()
def traced(
    lm: LanguageModel, cases: Cases, windows: Sequence[Sequence[int]], draws: int = 3, seed: int = 0
) -> list[float]:
    """Causal tracing (Meng et al. 2022, §2): what the MLPs of a window alone bring back of a fact.

    Noise of three standard deviations on the subject's embeddings hides the fact; then the window's MLPs say at the
    subject's last token what they said without noise.

    restored = Σ (p_restored − p_hidden) / Σ (p − p_hidden)     p of the true answer, sums over facts and draws

    Facts whose truth the model does not know (p < 0.1), or whose record does not tell it, are passed over; NaN if all.
    """
    asked = [(c.request, next((p.rival for p in c.probes if p.kind == "efficacy"), None)) for c in cases]
    rows = rewriting_rows(lm.tokenizer, [replace(r, target=truth) for r, truth in asked if truth], ("{}",))
    begins = [_begin(lm, request, row) for (request, _), row in zip([a for a in asked if a[1]], rows, strict=True)]
    layers = sorted({layer for window in windows for layer in window})
    if rows:
        knows = (_likelihood(lm, rows) >= KNOWN).tolist()
        rows, begins = ([x for x, known in zip(given, knows, strict=True) if known] for given in (rows, begins))
    if not rows:
        return [float("nan")] * len(windows)
    at, ends = torch.arange(len(rows), device=lm.device), torch.tensor([r.lookup for r in rows], device=lm.device)
    with reading(outputs={i: _mlp(lm, i) for i in layers}, then=lambda t: t[at, ends]) as clean:
        whole = _likelihood(lm, rows)
    draw, brought, hid = torch.Generator().manual_seed(seed), torch.zeros(len(windows)), 0.0
    for _ in range(draws):
        with _noise(lm, rows, begins, draw):
            dark = _likelihood(lm, rows)
            hid += (whole - dark).sum().item()
            for k, window in enumerate(windows):
                with ExitStack() as stack:
                    for layer in window:
                        stack.enter_context(_saying(_mlp(lm, layer), clean[layer], at, ends))
                    brought[k] += (_likelihood(lm, rows) - dark).sum().item()
    return (brought / hid).tolist()


def _mlp(lm: LanguageModel, layer: int) -> nn.Module:
    return lm.model.get_submodule(lm.architecture.mlp.format(layer))


def _begin(lm: LanguageModel, request: EditRequest, row: Row) -> int:
    """The subject's first token: the first that the prompt does not share with what stands before it."""
    before = encode(lm.tokenizer, request.prompt.partition("{}")[0].rstrip())
    same = [a == b for a, b in zip(before, row.ids, strict=False)]
    return min([*same, False].index(False), row.lookup)


def _likelihood(lm: LanguageModel, rows: Sequence[Row]) -> Tensor:
    """Probability of each row's labels, (rows,) on the CPU."""
    logits = lm.run(pad([row.ids for row in rows], lm.device)).logits
    found = [logits[i, list(row.read)].double().log_softmax(-1) for i, row in enumerate(rows)]
    return torch.stack(
        [part[range(len(row.labels)), list(row.labels)].sum() for part, row in zip(found, rows, strict=True)]
    ).exp().cpu()


def _noise(lm: LanguageModel, rows: Sequence[Row], begins: Sequence[int], draw: torch.Generator) -> RemovableHandle:
    """Three standard deviations on the subjects' embeddings, the same in every forward while the handle is held."""
    batch, embed = pad([row.ids for row in rows], lm.device), lm.model.get_input_embeddings()
    columns = torch.arange(batch.ids.shape[1])
    subject = torch.stack([(columns >= b) & (columns <= row.lookup) for b, row in zip(begins, rows, strict=True)])
    vectors = embed(batch.ids)
    noise = torch.randn(vectors.shape, generator=draw).to(vectors) * subject[..., None].to(vectors)
    noise *= 3 * vectors[subject.to(lm.device)].std()
    return embed.register_forward_hook(lambda _, __, out: out + noise)


def _saying(module: nn.Module, value: Tensor, at: Tensor, ends: Tensor) -> RemovableHandle:
    """The module's output is `value` at these places while the handle is held."""

    def say(_: nn.Module, __: tuple, output: object) -> object:
        state = hidden(output).clone()
        state[at, ends] = value
        return rewrap(output, state)

    return module.register_forward_hook(say)


def named(layers: Sequence[int]) -> str:
    """A window's layers, such as 4-8."""
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])


def text(frame: pd.DataFrame) -> str:
    """A sweep for a terminal: the table, what is best, and the recipe to paste."""
    shown = frame.assign(layers=frame.layers.map(named))[
        ["layers", *SCORES, "score", "relative_update", "restored", "flaw"]
    ].rename(columns={"relative_update": "|Δ|/|W|"})
    shown = shown if frame.flaw.any() else shown.drop(columns="flaw")
    before = ", ".join(f"{name} {value:.0f}" for name, value in frame.attrs["before"].items())
    best = frame.loc[frame.score.idxmax()]
    known = "" if frame.restored.notna().any() else "nothing to trace: the model knows none of these facts\n"
    return (
        f"{frame.attrs['edits']} edits by {frame.attrs['method']} at every window of layers; before: {before}\n"
        f"{plain(shown, 3)}\n{known}best: layers {named(best.layers)}. To paste into metake/recipes.toml:\n\n"
        f"{recipe_block(frame)}"
    )


def recipe_block(frame: pd.DataFrame) -> str:
    """The recipe of the sweep's best window, in the form of `recipes.toml`."""
    told, best = frame.attrs, list(frame.loc[frame.score.idxmax()].layers)
    name, like, usual = Path(told["model"]).name, recipe(told["like"]), recipe("default")
    found = ", ".join(
        f"{named(row.layers)} {row.efficacy:.0f}/{row.generalization:.0f}/{row.specificity:.0f}"
        for row in frame.itertuples()
    )
    with borrowed(told["model"], told["like"], best):
        chosen = {key: (recipe(told["model"]).numbers[key], "sweep") for key in OWN}
    others = {
        key: (value, "ours_like")
        for key, value in like.numbers.items()
        if key not in OWN and not key.endswith("_modules") and value != usual.numbers[key]
    }
    lines = [f"{key} = [{json.dumps(value)}, {json.dumps(why)}]" for key, (value, why) in (chosen | others).items()]
    names = [told["model"]] if "/" in told["model"] and not Path(told["model"]).exists() else []
    why = f"# metake layers: {told['edits']} facts, one batch of {told['method']}, efficacy/generalization/specificity"
    return "\n".join([f"[{json.dumps(name.lower())}]", f"names = {json.dumps(names)}", f"{why}: {found}", *lines])
