"""Edits under stress: unrelated text, the same subject, later batches."""

from __future__ import annotations

import pandas as pd
import pytest

import metake as mk
from metake.experiments.studies import stress


def records(lost, cases=40, methods=("memit", "metake")):
    """Records in which an editor loses a share of the facts at the hard end of each stress."""
    ends = {stress.PREFIX: ("0", "50"), stress.COMPANY: (stress.OTHER, stress.SAME), stress.AGE: ("0", "2")}
    return pd.DataFrame([
        {"stress": what, "group": group, "method": m, "seed": 0, "id": str(i), "efficacy": 1.0,
         stress.HELD: float(not hard or i >= lost.get((m, what), 0) * cases)}
        for what, groups in ends.items() for hard, group in enumerate(groups) for m in methods for i in range(cases)
    ])  # fmt: skip


def test_the_verdict_turns_with_one_editors_loss_under_one_stress():
    assert stress.judge(records({}))["holds"] is True
    told = stress.judge(records({("memit", stress.AGE): 0.5}))
    assert told["holds"] is False and "MEMIT, 2 batches: +50.0" in told["decided_by"]
    assert stress.judge(records({("metake", stress.PREFIX): 0.075}))["holds"] is None
    found = stress.losses(records({("memit", stress.COMPANY): 0.25})).set_index(["dataset", "method"]).difference
    assert found["same subject", "memit"] == 25 and found["same subject", "metake"] == 0


def test_pairs_share_their_subject_and_nothing_else():
    cases = mk.facts()
    first, second, other = stress.pairs(cases, 12, 0)
    assert [c.request.subject for c in first] == [c.request.subject for c in second]
    assert all(a.request.prompt != b.request.prompt for a, b in zip(first, second, strict=True))
    subjects = {c.request.subject for c in first}
    assert len(subjects) == 12 and not subjects & {c.request.subject for c in other}
    assert sum(a.request.prompt == b.request.prompt for a, b in zip(second, other, strict=True)) >= 10
    assert len({c.request.id for c in other}) == 12
    with pytest.raises(mk.ParameterError, match="subjects with two facts"):
        stress.pairs(cases, 600, 0)
