"""The methods: each a combination of parts, its numbers from `recipes.toml`. A new method is a function here.

`model` is a name with a recipe ("tiny", "smollm2-135m", "gpt2-xl", a hub name); keyword arguments replace any part.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

from metake.algebra.geometry import inverse_covariance, isotropic, null_space
from metake.algebra.postprocess import cap_spectrum, keep_largest, soften_principal
from metake.data.files import packaged
from metake.editing.editor import Editor, root, whole
from metake.editing.gradient.editor import GradientEditor
from metake.editing.gradient.rule import GradientRule
from metake.editing.gradient.trained import TRAINED as TRAINED
from metake.editing.gradient.trained import maps, trained
from metake.editing.gradient.trained import to_train as to_train
from metake.editing.outer import Refinement
from metake.editing.recipes import BORROWED, Recipe, recipe
from metake.editing.recipes import CHOSEN as CHOSEN_LAYERS
from metake.editing.targets import TargetRule
from metake.language.generation import ContextRule
from metake.support.errors import ParameterError, near_misses


def _target(numbers: Recipe, own: str = "", **changes: Any) -> TargetRule:
    """Stage I by a recipe's numbers; where a method has its own, under its name and `_`, by those."""
    names = ("steps", "step_size", "kl_weight", "decay", "clamp", "stop_below")
    found = {name: numbers.numbers.get(f"{own}_{name}", numbers.numbers[name]) for name in names}
    return TargetRule(**found | changes)


def _check_parts(kind: type, changes: Mapping[str, Any]) -> None:
    """Raises ParameterError, with near matches, for a part that editors of this kind do not have."""
    for name in changes:
        if name not in (parts := [f.name for f in fields(kind)]):
            raise ParameterError(near_misses(name, parts, "part of an editor"))


def memit(model: str, **changes: Any) -> Editor:
    """MEMIT (Meng et al. 2023, eq. 14): Δ = R Kᵀ(λC₀ + KKᵀ)⁻¹, the residual spread evenly, no memory of past edits."""
    _check_parts(Editor, changes)
    numbers = recipe(model)
    return replace(Editor(numbers.layers, inverse_covariance(numbers.covariance_weight), _target(numbers)), **changes)


def memit_seq(model: str, **changes: Any) -> Editor:
    """Sequential MEMIT (AlphaEdit's baseline): `memit` that remembers past keys, Δ = R Kᵀ(λC₀ + KₚKₚᵀ + KKᵀ)⁻¹."""
    return memit(model, **{"remember": True} | changes)


def alphaedit(model: str, **changes: Any) -> Editor:
    """AlphaEdit (Fang et al. 2025, eq. 14): Δ = R KᵀP(KₚKₚᵀP + KKᵀP + λI)⁻¹, P onto the preserved keys' null space."""
    numbers = recipe(model)
    return memit(model, **{"metric": null_space(numbers.threshold, numbers.ridge), "remember": True} | changes)


def rect(model: str, **changes: Any) -> Editor:
    """RECT (Gu et al. 2024) on MEMIT: of a weight's finished update only the largest relative changes are made."""
    return memit(model, **{"post": (keep_largest(recipe(model).rect_share),)} | changes)


def prune(model: str, **changes: Any) -> Editor:
    """PRUNE (Ma et al. 2025) on MEMIT: at the end, the change's singular values are capped by the original weight's."""
    return memit(model, **{"post": (cap_spectrum(),)} | changes)


def pmet(model: str, **changes: Any) -> Editor:
    """PMET (Li et al. 2024): targets of MLP and attention together, the MLP's written, R ∝ 1/√(layers left)."""
    numbers = recipe(model)
    target = _target(numbers, "pmet", site="mlp+attention", relax=0.1)
    parts = {"metric": inverse_covariance(numbers.pmet_covariance_weight), "target": target, "allocation": root}
    return memit(model, **parts | changes)


def rome(model: str, **changes: Any) -> Editor:
    """ROME (Meng et al. 2022, eq. 2): one request at a time, one layer, Δ = (v − Wk)(C⁻¹k̄)ᵀ/(C⁻¹k̄)ᵀk, exact at k."""
    numbers = recipe(model)
    parts = {"layers": (numbers.rome_layer,), "noise": 0.0, "together": 1, "plain": True, "allocation": whole}
    parts["metric"] = inverse_covariance(1.0) if numbers.rome_covariance else isotropic()
    parts["target"] = _target(numbers, "rome", site="mlp")
    parts["context_rule"] = ContextRule((5, 10), 2, flat=True)
    return memit(model, **parts | changes)


def emmet(model: str, **changes: Any) -> Editor:
    """EMMET (Gupta et al. 2024, eq. 9): ROME's equality for a batch, Δ = R (KᵀC⁻¹K)⁻¹KᵀC⁻¹, at ROME's layer."""
    parts = {"layers": (recipe(model).rome_layer,), "metric": inverse_covariance(1.0), "noise": 0.0}
    return memit(model, **parts | changes)


def blue(model: str, **changes: Any) -> Editor:
    """AlphaEdit-BLUE (Li et al. 2025): first and last layer only, each with its own targets and the whole residual."""
    numbers = recipe(model)
    parts = {"layers": numbers.blue_layers, "metric": null_space(numbers.threshold, numbers.blue_ridge)}
    return alphaedit(model, **parts | {"own_targets": True, "allocation": whole} | changes)


def sphere(model: str, **changes: Any) -> Editor:
    """SPHERE: AlphaEdit whose updates avoid the principal directions of the weight's rows, Δ ← Δ (I − αUUᵀ)."""
    numbers = recipe(model)
    return alphaedit(model, **{"post": (soften_principal(numbers.sphere_ratio, numbers.sphere_strength),)} | changes)


CHOSEN: dict[str, Any] = {
    "step_size": 0.01, "optimizer": "adam", "anchor_norm": "relative", "prompts": "plain",
    "locality_direction": "post_pre", "locality_position": "subject",
}  # fmt: skip
"""The reading of MetaKE's outer level that a rule fixed beforehand chose: `experiments.studies.choosing`."""

WHOLE = CHOSEN | {"look_ahead": "whole", "optimizer": "lbfgs", "step_size": 1.0, "prompts": "contexts"}
"""The outer level of `metake/whole`: what lowered F of the edit fastest, by the clock, on smollm2-135m."""

LITERAL = CHOSEN | {"step_size": 0.1, "anchor_norm": "sum", "prompts": "contexts", "keep": "last"}
"""Eqs 79–82 as they are written, with the prompts and the drift of Stage I: what `metake` took at first."""


def metake(
    model: str, base: Callable[..., Editor] = alphaedit, reading: Mapping[str, Any] = CHOSEN, **changes: Any
) -> Editor:
    """MetaKE (arXiv 2603.12677, §4, Algorithm 1): `base` with its targets refined through the frozen gate."""
    return base(model, **{"refine": Refinement(recipe(model).refine_steps, **reading)} | changes)


def metake_whole(model: str, base: Callable[..., Editor] = alphaedit, **changes: Any) -> Editor:
    """MetaKE looking ahead through all edited layers (arXiv 2603.12677, eq. 84): `metake` descending F of its edit."""
    return metake(model, base, WHOLE, **changes)


def metake_v1(model: str, **changes: Any) -> Editor:
    """MetaKE as in its first version (v1 eqs 7–9): `metake` on MEMIT with Δ = R Kᵀ(C + λI + KKᵀ)⁻¹, C = λ_C C₀."""
    numbers = recipe(model)
    return metake(model, memit, **{"metric": inverse_covariance(numbers.covariance_weight, numbers.v1_ridge)} | changes)


def ultraedit(model: str, **changes: Any) -> GradientEditor:
    """UltraEdit (Gu et al. 2025): Δ = Dᵀ(KKᵀ + I)⁻¹K, D = −η(k̂·k̂)ĝ, [k̂; ĝ] normalized over all edits; untrained."""
    _check_parts(GradientEditor, changes)
    rule = GradientRule(
        coefficient="normalized", living=True, step=recipe(model).ultraedit_step, tokens=recipe(model).gradient_tokens
    )
    return replace(GradientEditor(maps("ultraedit", model), rule), **changes)


def malmen(model: str, editor: str | None = None, **changes: Any) -> GradientEditor:
    """MALMEN (Tan et al. 2024): Δ = Dᵀ(KKᵀ + λI)⁻¹K, D = −η(k·k̃)g̃, [k̃; g̃] and η, λ by a trained network."""
    _check_parts(GradientEditor, changes)
    return replace(trained("malmen", model, editor), **changes)


def mend(model: str, editor: str | None = None, **changes: Any) -> GradientEditor:
    """MEND (Mitchell et al. 2022): Δ = −Σ η g̃ k̃ᵀ over all tokens, [k̃; g̃] and η by a trained network."""
    _check_parts(GradientEditor, changes)
    return replace(trained("mend", model, editor), **changes)


def smedit(model: str, editor: str | None = None, **changes: Any) -> GradientEditor:
    """SMEdit (Li et al. 2025): two steps of MALMEN, each from the slopes of the model as the last one left it; ‖Δ‖²."""
    _check_parts(GradientEditor, changes)
    return replace(trained("smedit", model, editor), **changes)


def ft(model: str, **changes: Any) -> GradientEditor:
    """FT (Meng et al. 2022): MEMIT's weights fine-tuned by Adam on −log p of the targets, Δ = −Σ η m̂/√v̂."""
    _check_parts(GradientEditor, changes)
    numbers = recipe(model)
    rule = GradientRule("adam", tokens="all", steps=numbers.steps, step=numbers.ft_step)
    return replace(GradientEditor(numbers.layers, rule), **changes)


def ft_l(model: str, **changes: Any) -> GradientEditor:
    """FT-L (Zhu et al. 2020; Meng et al. 2022): `ft` with every entry of the change kept within ±ε, |Δ| ≤ ε."""
    return ft(model, **{"limit": recipe(model).ft_limit} | changes)


def _ruled(editor: GradientEditor, **changes: Any) -> GradientEditor:
    return replace(editor, rule=replace(editor.rule, **changes))


GRADIENT: dict[str, Callable[..., GradientEditor]] = {
    "ultraedit": ultraedit, "malmen": malmen, "mend": mend, "smedit": smedit,
}  # fmt: skip
"""The gradient family: edits from inputs and output gradients of linear maps, without targets and key statistics."""

FINE_TUNING: dict[str, Callable[..., GradientEditor]] = {"ft": ft, "ft_l": ft_l}
"""Baselines: the weights themselves are trained on the requests, at most as many steps as Stage I takes."""

METHODS: dict[str, Callable[..., Editor]] = {
    "rome": rome, "memit": memit, "memit_seq": memit_seq, "emmet": emmet, "pmet": pmet, "prune": prune, "rect": rect,
    "alphaedit": alphaedit, "blue": blue, "sphere": sphere, "metake": metake, "metake/whole": metake_whole,
    "metake_v1": metake_v1,
}  # fmt: skip
"""Every method by name; what is in this table is tested, listed by the command line, and compared in the book."""

ABLATIONS: dict[str, Callable[[Editor], Editor]] = {
    "without bi-level": lambda editor: replace(editor, refine=None),
    "key-only gate": lambda editor: replace(editor, refine=replace(editor.refine, gate="key_only")),
    "stop-gradient": lambda editor: replace(editor, refine=replace(editor.refine, feedback=False)),
}
"""MetaKE's ablations (v3 Table 2), each a change of one part."""


OPERATORS: dict[str, Callable[..., Editor]] = {
    "metake/memit": partial(metake, base=memit), "metake/blue": partial(metake, base=blue),
    "metake/sphere": partial(metake, base=sphere), "metake/whole/memit": partial(metake, base=memit, reading=WHOLE),
    "metake/whole/sphere": partial(metake, base=sphere, reading=WHOLE),
    "metake/literal/memit": partial(metake, base=memit, reading=LITERAL),
    "metake/literal/blue": partial(metake, base=blue, reading=LITERAL),
    "metake/literal/sphere": partial(metake, base=sphere, reading=LITERAL),
}  # fmt: skip
"""MetaKE's readings on other methods' gates; a whole look-ahead needs one target for all layers, and BLUE has more."""


class Difference(NamedTuple):
    """A place where published code departs from its paper: our default follows the one, `make` builds the other."""

    make: Callable[..., Editor]
    paper: str
    code: str
    default: str  # "paper" or "code"; "ours" where no code was released: `code` then says what ours does

    @property
    def usual(self) -> str:
        """What the default does."""
        return self.paper if self.default == "paper" else self.code

    @property
    def option(self) -> str:
        """What `make` does instead."""
        return self.code if self.default == "paper" else self.paper

def _differences(made: Mapping[str, Callable[..., Any]]) -> dict[str, Difference]:
    told = tomllib.loads(packaged("differences.toml"))
    return {name: Difference(make, **told[name]) for name, make in made.items()}


DIFFERENCES: dict[str, Difference] = _differences({
    "metake/literal": partial(metake, reading=LITERAL),
    "prune/added-twice": partial(prune, post=(cap_spectrum(add_twice=True),)),
    "rect/original": partial(rect, post=(keep_largest(0.2, 0.0, strict=True),)),
    "sphere/stored": lambda model, **changes: sphere(
        model, **{"post": (replace(sphere(model).post[0], side=recipe(model).sphere_stored_side),)} | changes
    ),
    "alphaedit/paper": partial(alphaedit, metric=null_space(1e-2, 1.0)),
    "pmet/unweighted": lambda model, **changes: pmet(
        model, **{"target": replace(pmet(model).target, drift_weighted=False)} | changes
    ),
})  # fmt: skip
"""Where a paper and its released code, or two releases, disagree: each as a method of its own name."""

GRADIENT_DIFFERENCES: dict[str, Difference] = _differences({
    "mend/added": lambda model, **changes: _ruled(mend(model, **changes), added=True),
    "malmen/living": lambda model, **changes: _ruled(malmen(model, **changes), living=True),
    "malmen/micro-batch": lambda model, **changes: _ruled(malmen(model, **changes), micro=4),
})  # fmt: skip
"""The same of the gradient family."""


def named() -> dict[str, Callable[..., Editor | GradientEditor]]:
    """Every name that `method` knows: both families, fine-tuning, MetaKE on other operators, published differences."""
    differences = (DIFFERENCES | GRADIENT_DIFFERENCES).items()
    return METHODS | GRADIENT | FINE_TUNING | OPERATORS | {name: difference.make for name, difference in differences}


def planning(name: str, model: str, **changes: Any) -> Editor:
    """`method` for who looks at planned residuals. Raises ParameterError for one that edits from gradients."""
    if name.partition("/")[0] in GRADIENT | FINE_TUNING:
        raise ParameterError(
            f"{name} plans no residuals, its edit comes from gradients: it can be run and compared (metake run, the "
            "main comparison), but not looked at in its stages; choose a method that plans, such as memit"
        )
    return method(name, model, **changes)


def method(name: str, model: str, **changes: Any) -> Editor | GradientEditor:
    """The editor of a method by name. Raises ParameterError, with near matches, for an unknown name."""
    if name not in (known := named()):
        raise ParameterError(near_misses(name, known, "method"))
    own = BORROWED.get()
    if name.partition("/")[0] in GRADIENT and own and own.names == (model,) and own.sources["layers"] == CHOSEN_LAYERS:
        raise ParameterError(f"{name} edits the linear maps that a recipe names, not whole layers: leave layers out")
    return known[name](model, **changes)
