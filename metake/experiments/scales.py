"""How large the paper's figures and tables are, and the same in small: what `grid` makes cells of. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

PRIMARY = ("memit", "alphaedit", "metake")
NAMED = ("memit", "alphaedit", "blue", "sphere", "metake")  # whom the paper times, and follows along streams
TIMED = (*NAMED[:-1], "MetaKE, plain prompts")  # as `run_time` calls what `metake` does by default
FIRST = "quickstart"  # fetches a model and computes its key statistics: every other cell of the model waits for it


class Study(NamedTuple):
    """A recording besides the runs. shows: in the paper; models: of the scale's, all by default; numbers: settings of
    the function that makes it; seeds, methods: a cell each; () leaves it to the recording."""

    shows: str
    numbers: Mapping[str, Any] = {}
    models: Sequence[str] = ()
    seeds: Sequence[int] = ()
    methods: Sequence[str] = ()


class Needs(NamedTuple):
    """What a cell may take of a cluster's node, as Snakemake names it. mem_mb: of the machine, not of its GPU."""

    gpu: int = 0
    mem_mb: int = 4000
    runtime: int = 60  # minutes


@dataclass(frozen=True)
class Scale:
    """A grid: what is run, and where it goes. Its fields can be set from outside, see `grid.plan`.

    models: names or folders, with what a cell of each needs; further: models of Table 4, with `further_methods`;
    tasks: data of general ability, "" leaves Figure 6 out; results: folder of the recordings; work: of the cells.
    """

    models: Mapping[str, Needs]
    further: Mapping[str, Needs]
    methods: Sequence[str]
    further_methods: Sequence[str]
    seeds: Sequence[int]
    edits: int
    batch: int
    studies: Mapping[str, Study]
    results: str
    work: str
    trained: bool = True  # MEND and MALMEN are trained on the model first; else those that come with it are taken
    generate: bool = True  # fluency and consistency too
    counterfact: str = "facts"
    zsre: str = "facts-zsre"
    text: str = "embedded"
    text_tokens: int = 100_000
    tasks: str = "facts"

    @property
    def data(self) -> dict[str, str]:
        return {"CounterFact": self.counterfact, "ZsRE": self.zsre}


_BATCHES = tuple(range(20))  # the paper's 2,000 edits: 20 batches of 100, each here from the unedited model
_PAPER = {
    FIRST: Study(""),
    "dispersion": Study("Figure 1", {"requests": 2000}),
    "proxy": Study("Figures 3 and 8"),
    "realized": Study("Figure 4", {"edits": 500}, methods=PRIMARY),
    "kl_strength": Study("Figure 5", {"pool": 2000}, methods=PRIMARY),
    "ablation": Study("Table 2", {"edits": 100}, ("Meta-Llama-3-8B-Instruct",), _BATCHES),
    "sensitivity": Study("Table 3", {"edits": 100}, seeds=_BATCHES),
    "general_ability": Study(
        "Figure 6", {"edits": 3000, "batch": 100, "every": 500, "tests": 100}, ("Meta-Llama-3-8B-Instruct",),
        methods=("memit", "prune", "rect", "alphaedit", "blue", "sphere", "metake")
    ),
    "hidden_states": Study("Figure 7", {"methods_": ("alphaedit", "metake"), "edits": 2000, "held_out": 1000}),
    **{
        name: Study("Figure 9", {"edits": 5000, "batch": 100, "every": 500}, ("gpt2-xl",), methods=NAMED)
        for name in ("streams", "streams_zsre")
    },
    "bench": Study("Tables 5 and 6", {"methods_": TIMED, "literal": 0}),
}
_SMALL = {
    "dispersion": {"requests": 10}, "proxy": {"edits": 1}, "realized": {"edits": 3}, "kl_strength": {"pool": 5},
    "ablation": {"edits": 2}, "sensitivity": {"edits": 2}, "bench": {"edits": 2, "steps": 2},
    "general_ability": {"edits": 4, "batch": 2, "every": 2, "tests": 5},
    "hidden_states": {"edits": 6, "held_out": 6}, "streams": {"edits": 4, "batch": 2, "every": 2},
    "streams_zsre": {"edits": 4, "batch": 2, "every": 2},
}  # fmt: skip
_METHODS = (
    "mend", "malmen", "rome", "memit", "prune", "rect", "pmet", "alphaedit", "blue", "sphere", "metake"
)
SCALES = {
    "paper": Scale(
        {
            "openai-community/gpt2-xl": Needs(1, 32_000, 720), "EleutherAI/gpt-j-6b": Needs(1, 64_000, 1440),
            "meta-llama/Meta-Llama-3-8B-Instruct": Needs(1, 96_000, 1440),
        },
        {"microsoft/phi-1_5": Needs(1, 32_000, 720), "Qwen/Qwen3-4B-Thinking-2507": Needs(1, 64_000, 1440)},
        _METHODS, ("alphaedit", "blue", "sphere", "metake"), (0, 1, 2), 2000, 100, _PAPER, "results",
        "runs/grid/paper", counterfact="counterfact.json", zsre="zsre.json", tasks="hub"
    ),
    # in small, on what comes with the package: a rehearsal, so that its recordings stay out of results/
    "tiny": Scale(
        {"tiny": Needs()}, {}, _METHODS, (), (0, 1, 2), 4, 2,
        {
            name: study._replace(numbers=dict(study.numbers) | _SMALL.get(name, {}), models=(), seeds=study.seeds[:2])
            for name, study in _PAPER.items()
        },
        "runs/grid/tiny/results", "runs/grid/tiny", trained=False, text_tokens=3000
    ),
}  # fmt: skip
"""The paper's grid, and the same on the embedded model."""
