"""What an edit makes of the outer objective once it is applied: how plans are compared, whatever refined them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metake.algebra.update import Edit
from metake.data.requests import EditRequest
from metake.editing.outer import Refinement, scored
from metake.language.model import LanguageModel
from metake.language.prefixes import Split
from metake.language.tokens import Rows

MEASURED = Refinement(prompts="contexts", locality_direction="post_pre", locality_position="subject")
"""How edits are compared, whatever refined them: L_edit and L_loc as Stage I has them."""


@LanguageModel.entry()
def edited_losses(
    lm: LanguageModel, requests: Sequence[EditRequest] | Rows, contexts: Sequence[str], edit: Edit,
    rule: Refinement = MEASURED
) -> Tensor:
    """L_edit and L_loc of each request once an edit is applied, (n, 2) float64: F of v3 eq. 84 without its anchor.

    p₀ of L_loc is the model as it is. The model is restored. Cost: two forwards over the rewriting rows.
    """
    batch = Rows.of(lm.tokenizer, requests, contexts)
    parts = scored(lm, batch, rule, min(rule.tokens, lm.room(1, gradients=False)))

    def measured() -> Tensor:
        """The first call keeps p₀."""
        found = (
            bucket.losses(run.logits(-1, Split(None, None), bucket.places), len(batch), rule.locality_direction)
            for bucket, run in parts
        )
        return sum(torch.stack(losses, 1).double() for losses in found)

    measured()
    with edit.applied(lm):
        return measured()
