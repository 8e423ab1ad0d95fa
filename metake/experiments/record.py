"""Recorded runs of a real model: made once, kept in `results/` with their provenance, drawn beside what is recomputed.

Every part goes on where an earlier call stopped: finished recordings are kept, unfinished runs resume.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from metake import report
from metake.editing.gradient.trained import SHIPPED_RANK
from metake.experiments import grid
from metake.experiments.borrowed import borrowing
from metake.experiments.made import provenance, settings
from metake.experiments.speed.run_time import PLAIN, run_time
from metake.experiments.studies.ablation import ablation
from metake.experiments.studies.asked import names
from metake.experiments.studies.carries import carries
from metake.experiments.studies.case_study import case_study
from metake.experiments.studies.choosing import descending
from metake.experiments.studies.comparison import PRIMARY, comparison
from metake.experiments.studies.dispersion import association_dispersion
from metake.experiments.studies.gamma_beforehand import gamma_beforehand
from metake.experiments.studies.general_ability import general_ability
from metake.experiments.studies.hidden_states import hidden_states
from metake.experiments.studies.kl_strength import kl_strength
from metake.experiments.studies.open_readings import open_readings
from metake.experiments.studies.operators import operators, twins
from metake.experiments.studies.precision import precision
from metake.experiments.studies.quickstart import quickstart
from metake.experiments.studies.readings import SETS
from metake.experiments.studies.realized_residual import realized_residual
from metake.experiments.studies.sensitivity import sensitivity
from metake.experiments.studies.step_more import RECORDED, step_more
from metake.experiments.studies.streams import streams
from metake.experiments.studies.stress import stress
from metake.experiments.studies.teacher_forcing import teacher_forcing
from metake.experiments.studies.text_needed import text_needed
from metake.experiments.studies.trained_editors import COMPARED as COMPARED_EDITORS
from metake.experiments.studies.trained_editors import trained_editors
from metake.experiments.studies.training_choices import outer_prompts, penalty
from metake.experiments.studies.whose import READINGS
from metake.experiments.theory.proxy_fidelity import proxy_fidelity
from metake.methods import METHODS, named
from metake.support.errors import ParameterError, near_misses

# hours on a real model's CPU: only if `only` names them
LONG = (
    "streams", "streams_zsre", "sequences", "asking", "portability", "stress", "penalty", "outer_prompts", "step_more",
    "trained_editors", "states_by_reading"
)
GROWS = "sequences"  # hours a seed: each is added to what is recorded
HELD_OUT = ("alphaedit", *READINGS)
TASKED = "general_ability"  # only if there is task data
STUDIED = ("memit", "alphaedit", "metake", "sphere", "blue", "rect", "prune", "pmet", "rome")
FREELY = ("in_prompt", "in_prompt/beside", *HELD_OUT, "memit", "ft", "ft_l")  # what costs least comes first
STREAMED = ("alphaedit", "metake", "memit", "blue", "sphere", "memit_seq", "prune", "rect")
# not hidden_states: its maps place the states of all methods together
OF_METHODS = (
    "comparison", "sequences", "asking", "portability", "stress", "gamma", "bench", "case_study", "general_ability",
    "streams", "streams_zsre", "realized", "kl_strength", "trained_editors", "operators",
    "ablation"
)
BESIDE_TELLING = ("asking", "portability", "stress")  # which know the fact in the prompt as a method
COMPARED = STREAMED[:5]  # MetaKE and whom the paper compares it with: on a real model the others would be hours more


def record(
    model: str,
    counterfact: str | None = None,
    zsre: str | None = None,
    text: str = "embedded",
    edits: int = 100,
    batch: int = 100,
    seeds: Sequence[int] = (0,),
    only: Sequence[str] | None = None,
    tokens: int | None = 100_000,
    tasks: str | None = None,
    methods: Sequence[str] | None = None,
    scale: str | None = None,
    out: str | Path | None = None,
) -> Iterator[str]:
    """Make the recordings of `model` that are missing, and say which; `only` makes the named ones again, and with
    `methods` only these methods' rows of them: the others stay as they are recorded, each with its own provenance.

    counterfact, zsre: files of records (default: the embedded facts); text, tokens: of the key statistics; edits:
    cases of a run, and a tenth of a stream's;
    tasks: data of the general-ability tasks (`items.read_items`), without which that recording is left out;
    scale: of the named recordings, the numbers of `scales.SCALES` instead of these; out: a folder instead of results/,
    with what is finished of an unfinished one in `out`/work: several processes may then record side by side.
    """
    data = {"CounterFact": counterfact or "facts", "ZsRE": zsre or "facts-zsre"}
    common: dict[str, Any] = {"model": model, "text": text, "text_tokens": tokens}
    # one folder for all of a size: what one part has run, the other reads
    size = f"{edits}x{batch}"
    runs = report.project_root() / "runs" / "-".join([f"record-{Path(model).name}", *_borrowed(model), size])
    folder = Path(out) if out else report.project_root() / "results"
    runs = folder / "work" if out else runs
    parts = _parts(common, data, edits, batch, seeds, runs, tasks or "", list(methods or ()))
    if unknown := [name for name in only or () if name not in parts]:
        raise ParameterError(near_misses(unknown[0], parts, "recording"))
    _check_methods(methods, only)
    if TASKED in (only or ()) and not tasks:
        raise ParameterError(f"the recording {TASKED!r} needs task data; name a folder of it: --tasks DIR")
    sizes = grid.settings(scale, only) if scale else {}
    for name, make in parts.items():
        target = f"{name}-{Path(model).name}"
        there = (folder / f"{target}.jsonl").is_file()
        if name in only if only else not (there or name in LONG or (name == TASKED and not tasks)):
            start, origin = time.perf_counter(), provenance(model, data, text, tokens)
            write = report.merge_recorded if there and (methods or name == GROWS) else report.write_recorded
            frame = make(**sizes.get(name, {}))
            write(target, frame, origin | settings(frame, time.perf_counter() - start), folder)
            yield f"wrote {folder.name}/{target}.jsonl"
        else:
            yield f"{'kept' if there else 'left out'} {folder.name}/{target}.jsonl" + (
                "" if there or tasks or name != TASKED else ": no task data, name a folder of it with --tasks"
            )


def _borrowed(model: str) -> list[str]:
    """Whose recipe and which layers the model is given, if not its own."""
    told = borrowing(model)
    return [word for word in (told.get("recipe"), "_".join(map(str, told.get("layers") or ()))) if word]


def _check_methods(methods: Sequence[str] | None, only: Sequence[str] | None) -> None:
    """Raises ParameterError for methods that nobody knows, or of recordings that do not compare methods."""
    if not methods:
        return
    known = names() if only and {*only} <= {*BESIDE_TELLING} else named()
    if unknown := [name for name in methods if name not in known]:
        raise ParameterError(near_misses(unknown[0], known, "method"))
    if wrong := [name for name in only or ("every recording",) if name not in OF_METHODS]:
        raise ParameterError(
            f"only recordings that compare methods can be made again for some of them: --only {' '.join(OF_METHODS)}; "
            f"found {wrong[0]}"
        )


def _parts(
    common: dict[str, Any], data: dict[str, str], edits: int, batch: int, seeds: Sequence[int], runs: Path, tasks: str,
    own: Sequence[str] = ()
) -> dict[str, Callable[..., pd.DataFrame]]:
    """Every recording by name; runs: folder of what is finished; own: the methods to compare, if not the usual ones."""
    sequences = common | {"data": data, "edits": edits, "batch": batch, "seeds": seeds, "out": runs}
    # on the subjects on which nothing was chosen
    held_out = sequences | {"edits": 2 * batch, "part": "testing", "out": runs / "testing"}
    one_stream = common | {"methods": own or (STREAMED if common["model"] == "tiny" else COMPARED), "seed": seeds[0]}
    return {
        "quickstart": partial(quickstart, **common),
        "text": partial(
            text_needed, **common, data=data["CounterFact"], edits=min(edits, 30), seed=seeds[0], out=runs / "text"
        ),
        "precision": partial(
            precision, **common, data=data["CounterFact"], edits=min(edits, 40), batch=10, seed=seeds[0],
            out=runs / "precision"
        ),
        "dispersion": partial(association_dispersion, **common, requests=700, data=data),
        # without fluency and consistency: sampling costs several times the edits on a CPU
        "comparison": partial(comparison, **sequences, methods=own or list(METHODS)),
        "sequences": partial(comparison, **held_out, methods=own or HELD_OUT),
        # those same runs and the baselines, asked freely too: what is edited already is only asked
        "asking": partial(teacher_forcing, **held_out, methods=own or FREELY),
        # of the embedded facts, in one batch: those that have consequences are 55
        "portability": partial(
            carries, **common, methods=own or FREELY, edits=50, batch=50, seed=seeds[0], out=runs / "portability"
        ),
        **_of_runs(sequences, own),
        "gamma": partial(gamma_beforehand, **sequences, **({"methods_": own} if own else {})),
        # MEMIT's batch is AlphaEdit's but for the solve
        "bench": partial(
            run_time, **common, methods_=own or ("alphaedit", "metake", PLAIN), data=data["CounterFact"], edits=100,
            literal=3
        ),
        "case_study": partial(
            case_study, **common, methods=own or STUDIED, data=data["CounterFact"], edits=20, length=100,
            out=runs / "case_study"
        ),
        **_studies(common, data, edits, seeds, runs, own),
        # half an hour of one core: a third of it for seven times 300 questions, the rest for Stage I
        TASKED: partial(
            general_ability, **common, methods=own or PRIMARY, edits=120, batch=60, every=60, tasks=tasks, tests=50,
            data=data["CounterFact"], seed=seeds[0], out=runs / TASKED
        ),
        "proxy": partial(proxy_fidelity, **common, edits=100, data=data["CounterFact"], out=runs / "proxy"),
        **{
            name: partial(streams, **one_stream, **_stream(edits), data=source, out=runs / name)
            for name, source in (("streams", data["CounterFact"]), ("streams_zsre", data.get("ZsRE")))
        },
    }


def _of_runs(sequences: dict[str, Any], own: Sequence[str]) -> dict[str, Callable[..., pd.DataFrame]]:
    """Those that read the comparison's runs."""
    states = {k: v for k, v in sequences.items() if k != "seeds"} | {"held_out": 100, "seed": sequences["seeds"][0]}
    return {
        "operators": partial(operators, **sequences, methods_=own or twins(readings=READINGS)),
        "hidden_states": partial(hidden_states, **states),
        # apart, so that the maps of all methods need not be made again with them
        "states_by_reading": partial(hidden_states, **states, methods_=HELD_OUT, maps=False),
    }


def _studies(
    common: dict[str, Any], data: dict[str, str], edits: int, seeds: Sequence[int], runs: Path, own: Sequence[str]
) -> dict[str, Callable[..., pd.DataFrame]]:
    """Those of one batch by several editors, which share what is finished."""
    asked, kept = common | {"seeds": seeds}, runs / "study"
    others = _of_other_models("open_readings", common["model"])
    return {
        # of the embedded facts: of those 39 subjects have several
        "stress": partial(
            stress, **common, methods=own or FREELY, edits=min(edits, 100), batch=20, subjects=30,
            prefixes=(0, 16, 50, 200), seed=seeds[0], out=runs / "stress"
        ),
        "ablation": partial(ablation, **asked, readings=own or READINGS, edits=min(edits, 50), data=data, out=kept),
        "realized": partial(
            realized_residual, **asked, methods_=own or PRIMARY, edits=edits, data={"ZsRE": data.get("ZsRE")}, out=kept
        ),
        # a share of 95 % of them needs 20 at least; a refinement a reading, two for testing: a real model's take hours
        "open_readings": lambda: open_readings(
            **common, readings=SETS["all"] if common["model"] == "tiny" else descending(*others),
            edits=40 if common["model"] == "tiny" else 20, test_edits=20, test_seeds=(2,), data=data, beside=others,
            out=runs / "open_readings"
        ),
        # of networks as small as those that ship with the package
        **{
            made.__name__: partial(
                made, common["model"], rank=SHIPPED_RANK, data=data["CounterFact"], out=runs / "trainings"
            )
            for made in (penalty, outer_prompts)
        },
        "trained_editors": partial(
            trained_editors, **common, names=own or COMPARED_EDITORS, data=data, edits=20, batches=5, alone=20,
            seed=seeds[0], out=runs / "trained_editors"
        ),
        "step_more": partial(
            step_more, common["model"], RECORDED, 40, (0, 1, 2), data=data["CounterFact"], shipped=False,
            out=runs / "step_more", rank=SHIPPED_RANK
        ),
        # 7 λ_KL, each another Stage I: of 100 requests a fifth in each group, half an hour on two cores
        "kl_strength": partial(
            kl_strength, **asked, methods_=own or PRIMARY, pool=edits, data={"ZsRE": data.get("ZsRE")}, out=kept
        ),
        # 11 refinements
        "sensitivity": partial(sensitivity, **asked, edits=min(edits, 30), data=data, out=kept),
    }


def _of_other_models(name: str, model: str) -> list[pd.DataFrame]:
    """What is recorded under a name for other models."""
    there = sorted((report.project_root() / "results").glob(f"{name}-*.jsonl"))
    return [report.recorded(path.stem) for path in there if path.stem != f"{name}-{Path(model).name}"]


def _stream(edits: int, batch: int = 20, points: int = 10) -> dict[str, int]:
    """A stream ten times as long as other runs: its edits, in small batches, and how far its evaluations lie apart."""
    return {"edits": points * edits, "batch": batch, "every": -(-edits // batch) * batch}
