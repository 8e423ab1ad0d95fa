"""Every verdict of a study says how far it is from turning: beyond its error it turns, within it nothing is decided."""

from __future__ import annotations

import pandas as pd
import pytest

from metake import report
from metake.experiments.speed import run_time
from metake.experiments.studies import (
    ablation,
    case_study,
    comparison,
    differences,
    dispersion,
    general_ability,
    hidden_states,
    kl_claims,
    open_readings,
    operators,
    predictors,
    realized_residual,
    sensitivity,
    streams,
)

FAR = 1e6
SIDES = {1.25: True, 0.75: None, 0.0: None, -0.75: None, -1.25: False}
"""How many errors a value lies on the claim's side of its bound → what can be said of the claim."""


def rows(at: float, error: float = 1.0, **told) -> pd.DataFrame:
    return pd.DataFrame([told | {"difference": at, "low": at - error, "high": at + error}])


def of_comparison(d: float, *_):
    return comparison.judge(rows(d, metric="efficacy", dataset="F"))


def of_ablation(d: float, *_):
    far = rows(FAR, metric="efficacy", dataset="F", method="b")
    return ablation.judge(pd.concat([far, rows(d, metric="generalization", dataset="F", method="a")]).reset_index())


def of_operators(d: float, patch):
    found = [rows(v, metric="efficacy", dataset="F", method=m) for v, m in ((FAR, "memit"), (d, "blue"))]
    patch.setattr(operators, "differences", lambda *_, **__: pd.concat(found).reset_index())
    return operators.judge(pd.DataFrame(), "metake")


def of_dispersion(d: float, *_):
    found = pd.DataFrame({"dataset": ["z", "c"], "ratio": [9 + d, 9.0], "low": [8.5 + d, 8.5], "high": [9.5 + d, 9.5]})
    return dispersion.judge(found.assign(method="alphaedit"), "z", "c")


def of_case_study(d: float, *_):
    found = pd.DataFrame({"method": ["metake", *case_study.NAMED], "target": [50.0 + 10 * d, 50.0, 1.0, 1.0, 1.0]})
    return case_study.judge(found.assign(cases=20, low=found.target - 5, high=found.target + 5))


def of_streams(d: float, *_):
    found = [rows(v, method=m) for m, v in zip(streams.NAMED, (d, FAR, FAR, FAR), strict=True)]
    return streams.judge(pd.concat(found).assign(quantity="level", metric="all three"))


def of_gamma(d: float, *_):
    row = {"dataset": "F", "method": "memit", "outcome": "o", "edits": 90, "fail": 40, "brier": 0.1, "skill": 0.1}
    row |= {"auroc": 0.7, "low": 0.6, "high": 0.8, "above": d, "above_low": d - 1, "above_high": d + 1}
    names = {predictors.RAW: False, predictors.GAMMA: False, "key norm": True}
    return predictors.judge(pd.DataFrame([row | {"predictor": n, "best": b} for n, b in names.items()]))


def of_general_ability(d: float, patch):
    own = {"change": FAR, "low": FAR, "high": FAR}
    against = {"difference": d, "difference_low": d - 1, "difference_high": d + 1}
    found = [{"method": "metake"} | own, {"method": "memit"} | own | against]
    found += [{"method": "alphaedit"} | own | dict.fromkeys(against, FAR)]
    patch.setattr(general_ability, "readable", lambda _: "generated")
    patch.setattr(general_ability, "able", lambda *_: ["sst2"])
    patch.setattr(general_ability, "changes", lambda *_: pd.DataFrame(found))
    return general_ability.judge(pd.DataFrame())


def of_hidden_states(d: float, *_):
    found = rows(1 - 0.1 * d, 0.1, method="alphaedit", dataset="F", group="edited", measure="Fréchet")
    return hidden_states.judge(found.rename(columns={"difference": "value"}), least=0.0)


def of_realized_residual(d: float, *_):
    return realized_residual.judge(rows(d, dataset="F", reading="whole"), least=0.0)


def of_kl_strength(d: float, *_):
    shift = {"dataset": "F", "octaves": 3, "low": 3, "high": 3, "nearer": 3, "nearer_low": 3, "nearer_high": 3}
    shifts = pd.DataFrame([shift | {"method": m, "undecided": ""} for m in comparison.PRIMARY])
    leads = pd.concat([rows(v, dataset="F", method=m) for m, v in (("memit", d), ("alphaedit", FAR))])
    return kl_claims.judge(shifts, leads.assign(above=8, equal=0, below=0))


def of_open_readings(d: float, patch):
    finer = [rows(v, metric=m, method="a", dataset="F") for m, v in zip(open_readings.CLAIMED, (d, FAR), strict=True)]
    found = pd.concat(finer).reset_index()
    patch.setattr(open_readings, "differences", lambda *_: found.assign(most=found.high))
    patch.setattr(open_readings, "gains", lambda *_: rows(FAR, dataset="F", reading="whole"))
    patch.setattr(open_readings, "consequence", lambda _: "")
    return open_readings.judge(pd.DataFrame({"part": ["testing"], "reading": [open_readings.LITERAL]}))


def of_sensitivity(d: float, *_):
    told = {"dataset": "F", "sweep": "steps", "value": 5.0, "requests": 10**6}
    found = [rows(5 - d, measure="efficacy", **told), rows(-FAR, measure="trade_off", **told)]
    return sensitivity.judge(pd.concat(found).reset_index(), least=5.0)


def of_the_promise(d: float, *_):
    """Half of the ratio is what two timings of the same work are apart."""
    error = 0.25 + 0.25
    ratio = 10 / (1 - d * error)
    times = {"literal": (ratio, 1.25 * FAR), "accelerated": (1.0, 1.25)}
    found = [
        {"method": m, "stage": "targets", "path": p, "seconds": s, "seconds_per_edit": s}
        for p, both in times.items()
        for m, s in zip(("alphaedit", "metake"), both, strict=True)
    ]
    frame = pd.DataFrame(found)
    frame.loc[frame.seconds == 1.25 * FAR, "seconds"] = 1.25 * ratio
    return run_time.judge_speed(frame)


def of_run_time(d: float, *_):
    reported = run_time.reported_overhead(report.paper("table5"))
    spread = 0.05
    ratio = (1.665 + 2 * spread * d) / (1 + 2 * spread * d)  # d = (1.665 − ratio) / (2 spread (ratio − 1))
    measured = pd.DataFrame({"method": ["metake"], "accelerated": [ratio]})
    return run_time.judge(reported, measured, pd.Series({"accelerated": spread}))


JUDGES = {name: call for name, call in globals().items() if name.startswith("of_")}


@pytest.mark.parametrize("name", JUDGES)
@pytest.mark.parametrize(("distance", "holds"), SIDES.items())
def test_a_verdict_turns_beyond_its_error_and_says_how_far_that_is(name, distance, holds, monkeypatch):
    found = JUDGES[name](distance, monkeypatch)
    assert found["holds"] is holds and found["margin"] == pytest.approx(abs(distance), abs=1e-9)
    assert found["error"] and found["decided_by"]


@pytest.mark.parametrize(("changes", "holds", "margin"), [
    ((4.0, 1.5), True, 1.5), ((0.5, 0.1), False, 2.0), ((4.0, 0.5), None, 2.0), ((1.0, 1.0), False, 1.0),
])  # fmt: skip
def test_an_update_differs_by_multiples_of_what_counts(changes, holds, margin):
    named, ours = ["rect/original", "sphere/stored"], 0.001  # of MetaKE no code was released: it decides nothing
    change = [differences.MATTERS * c for c in (*changes, ours)]
    found = differences.judge(pd.DataFrame({"option": [*named, "metake/literal"], "change": change}))
    assert (found["holds"], found["margin"]) == (holds, pytest.approx(margin)) and "metake" not in found["decided_by"]


def test_a_rise_too_small_to_count_is_no_rise():
    """Its interval leaves out zero: only what was fixed beforehand says that it is little."""
    assert realized_residual.judge(rows(0.02, 0.001, dataset="F", reading="whole"))["margin"] == pytest.approx(2)
    little = realized_residual.judge(rows(0.008, 0.005, dataset="F", reading="whole"))
    assert little["holds"] is None and little["margin"] < 1
    assert realized_residual.judge(rows(0.008, 0.001, dataset="F", reading="whole"))["holds"] is False


def test_among_few_requests_what_does_not_change_proves_little():
    told = {"dataset": "F", "sweep": "steps", "value": 5.0}
    found = pd.concat([rows(0.0, 0.0, measure="efficacy", **told), rows(-9.0, measure="trade_off", **told)])
    few, more = (sensitivity.judge(found.assign(requests=n).reset_index()) for n in (59, 90))
    assert few["holds"] is None and few["margin"] < 1 and more["holds"] is True
    assert more["margin"] == pytest.approx(1.5), "3/n against a twentieth"


def test_times_of_one_method_say_nothing_of_their_error():
    told = {"method": "alphaedit", "stage": "targets", "seconds": [1.0, 99.0], "seconds_per_edit": [1.0, 99.0]}
    found = run_time.judge_speed(pd.DataFrame(told | {"path": ["accelerated", "literal"]}))
    assert found["holds"] is None and "AlphaEdit 99.0 times" in found["decided_by"]
    assert run_time.judge_speed(pd.DataFrame(told | {"path": ["accelerated", "slow"]}))["holds"] is None
