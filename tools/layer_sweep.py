"""Choose the edited layers of a model: the same small batch written at every window of layers, evaluated and ranked.

    python tools/layer_sweep.py smollm2-135m --data records.json --text articles.txt --width 5 --edits 10

Prints one line per window: efficacy, generalization, specificity after one batch of AlphaEdit,
and their harmonic mean. The layers in `recipes.toml` marked "sweep" come from this script;
what it showed stands beside them.
"""

from __future__ import annotations

import argparse
from statistics import harmonic_mean

import metake as mk
from metake.experiments.cases import read_cases, select


def sweep(
    model: str, data: str, text: str, width: int, edits: int, stride: int, tokens: int | None, method: str, first: int,
    last: int | None
) -> list[tuple[float, str]]:
    lm = mk.load(model)
    cases = select(lm, read_cases(data), edits, seed=1)
    depth = min(last or lm.depth - 2, lm.depth - 2)
    windows = [tuple(range(start, start + width)) for start in range(first, depth - width + 2, stride)]
    statistics = mk.statistics(lm, text, layers=sorted({i for w in windows for i in w}), tokens=tokens)
    print("before", mk.evaluate(lm, cases))
    ranked = []
    for layers in windows:
        editor = mk.methods.method(method, model, layers=layers)
        edit = editor.edit(lm, [c.request for c in cases], statistics)
        with edit.applied(lm):
            found = mk.evaluate(lm, cases)
        score = harmonic_mean([found[m] for m in ("efficacy", "generalization", "specificity")])
        stats = edit.record.layers[str(layers[-1])]
        ranked.append(
            (
                score,
                f"layers {layers[0]}-{layers[-1]}: score {score:5.1f}  {found}  |Δ|/|W| {stats['relative_update']:.3f}",
            )
        )
        print(ranked[-1][1], flush=True)
    return sorted(ranked, reverse=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", default="facts")
    parser.add_argument("--text", default="embedded")
    parser.add_argument("--text-tokens", type=int)
    parser.add_argument("--width", type=int, default=5)
    parser.add_argument("--stride", type=int, default=2)
    parser.add_argument("--edits", type=int, default=10)
    parser.add_argument("--method", default="alphaedit")
    parser.add_argument("--first", type=int, default=0, help="do not go below this layer")
    parser.add_argument("--last", type=int, help="do not go above this layer")
    args = parser.parse_args()
    print(
        "best:",
        sweep(
            args.model, args.data, args.text, args.width, args.edits, args.stride, args.text_tokens, args.method,
            args.first, args.last
        )[0][1],
    )
