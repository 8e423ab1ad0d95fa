"""What the theory pages measure on: a few facts, their Stage-I targets, the frozen gate of the last edited layer."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from metake import methods
from metake.algebra.solve import gate
from metake.data.facts import facts
from metake.data.requests import EditRequest
from metake.editing.editor import Editor
from metake.editing.keys import KeyReader
from metake.editing.outer import LastLayer, OuterObjective, Refinement
from metake.editing.state import EditorState
from metake.editing.statistics import statistics
from metake.editing.targets import Targets, optimize_targets
from metake.experiments.theory.hypergradient import Hypergradient
from metake.language.model import LanguageModel, load


class RealLayer(NamedTuple):
    """A batch on a live model, ready to be refined at layer L."""

    lm: LanguageModel
    editor: Editor
    state: EditorState
    requests: list[EditRequest]
    keys: Tensor  #   (n, d_in)  K
    targets: Targets
    gate: Tensor  #   (n, d_in)  M

    @property
    def layer(self) -> int:
        return self.editor.layers[-1]

    @property
    def terms(self) -> int:
        """Products that a number passes through, at most: the longest sum of a block, times the blocks."""
        return self.lm.shape(self.lm.write_path(self.layer))[1] * self.lm.depth

    def outer(self, rule: Refinement) -> OuterObjective:
        """The look-ahead objective F_VL of the batch."""
        return LastLayer(self.lm, self.requests, self.state.contexts, self.targets, self.gate, rule)

    def layer_keys(self) -> dict[int, Tensor]:
        """K of every edited layer on the live model, (n, d_in) each."""
        reader = KeyReader(self.lm, self.requests, self.state.contexts, self.layer)
        return {i: reader.read(i).keys for i in self.editor.layers}

    def downstream(self, rule: Refinement, index: int | None = None) -> tuple[Hypergradient, Tensor]:
        """F through the whole edit of all layers, and V_init: of one request alone, or of the batch."""
        own = slice(None) if index is None else slice(index, index + 1)
        targets = replace(
            self.targets, anchor=self.targets.anchor[own], planned=self.targets.planned[own],
            trace=self.targets.trace[own]
        )
        return Hypergradient(
            self.lm, self.requests[own], replace(self.editor, refine=rule), self.state, targets
        ), targets.value


def prepare(
    model: str, count: int, method: str = "metake/literal", text: str = "embedded", text_tokens: int | None = None
) -> RealLayer:
    """The first embedded facts on `model`, up to where the outer level starts; keys of the plain prompt alone."""
    lm = load(model)
    editor = replace(methods.method(method, model), contexts=("{}",))
    state = editor.init(lm, statistics(lm, text, layers=editor.layers, tokens=text_tokens))
    asked = [case.request for case in facts(limit=count)]
    layer = editor.layers[-1]
    keys = KeyReader(lm, asked, state.contexts, layer).read(layer).keys
    targets = optimize_targets(lm, asked, state.contexts, layer, editor.target)
    return RealLayer(lm, editor, state, asked, keys, targets, gate(keys, state.metrics[layer], editor.noise))
