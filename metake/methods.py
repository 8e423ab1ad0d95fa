"""The methods: each a combination of parts, its numbers from `recipes.toml`. A new method is a function here.

`model` is a name with a recipe ("tiny", "smollm2-135m", "gpt2-xl", a hub name); keyword arguments replace any part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from metake.bilevel import Refinement
from metake.editor import Editor
from metake.errors import ParameterError, near_misses
from metake.geometry import inverse_covariance, null_space
from metake.recipes import Recipe, recipe
from metake.targets import TargetRule


def _with(editor: Editor, changes: dict[str, Any]) -> Editor:
    for name in changes:
        if name not in {f.name for f in fields(Editor)}:
            raise ParameterError(near_misses(name, (f.name for f in fields(Editor)), "part of an editor"))
    return replace(editor, **changes)


def _target(numbers: Recipe) -> TargetRule:
    return TargetRule(numbers.steps, numbers.step_size, numbers.kl_weight, numbers.decay, numbers.clamp, numbers.stop_below)


def memit(model: str, **changes: Any) -> Editor:
    """MEMIT (Meng et al. 2023, eq. 14): Δ = R Kᵀ(λC₀ + KKᵀ)⁻¹, the residual spread evenly, no memory of past edits."""
    numbers = recipe(model)
    return _with(Editor(numbers.layers, inverse_covariance(numbers.covariance_weight), _target(numbers)), changes)


def memit_seq(model: str, **changes: Any) -> Editor:
    """Sequential MEMIT (AlphaEdit's baseline): `memit` that remembers past keys, Δ = R Kᵀ(λC₀ + KₚKₚᵀ + KKᵀ)⁻¹."""
    return memit(model, **{"remember": True, **changes})


def alphaedit(model: str, **changes: Any) -> Editor:
    """AlphaEdit (Fang et al. 2025, eq. 14): Δ = R KᵀP(KₚKₚᵀP + KKᵀP + λI)⁻¹, P onto the preserved keys' null space."""
    numbers = recipe(model)
    return memit(model, **{"metric": null_space(numbers.threshold, numbers.ridge), "remember": True, **changes})


def metake(model: str, base: Callable[..., Editor] = alphaedit, **changes: Any) -> Editor:
    """MetaKE (arXiv 2603.12677, §4, Algorithm 1): `base` with its targets refined through the frozen gate."""
    numbers = recipe(model)
    return base(model, **{"refine": Refinement(numbers.refine_steps, numbers.refine_step_size), **changes})


def metake_v1(model: str, **changes: Any) -> Editor:
    """MetaKE as in its first version (v1 eqs 7–9): `metake` on MEMIT with Δ = R Kᵀ(C + λI + KKᵀ)⁻¹, C = λ_C C₀."""
    numbers = recipe(model)
    return metake(model, memit, **{"metric": inverse_covariance(numbers.covariance_weight, numbers.v1_ridge), **changes})


METHODS: dict[str, Callable[..., Editor]] = {f.__name__: f for f in (memit, memit_seq, alphaedit, metake, metake_v1)}
"""Every method by name; what is in this table is tested, listed by the command line, and compared in the book."""

ABLATIONS: dict[str, Callable[[Editor], Editor]] = {
    "without bi-level": lambda editor: replace(editor, refine=None),
    "key-only gate": lambda editor: replace(editor, refine=replace(editor.refine, gate="key_only")),
    "stop-gradient": lambda editor: replace(editor, refine=replace(editor.refine, feedback=False)),
}
"""MetaKE's ablations (v3 Table 2), each a change of one part."""


def method(name: str, model: str, **changes: Any) -> Editor:
    """The editor of a method by name. Raises ParameterError, with near matches, for an unknown name."""
    if name not in METHODS:
        raise ParameterError(near_misses(name, METHODS, "method"))
    return METHODS[name](model, **changes)
