"""The picture of β in the plane: its script says what the library says, needs nothing from the network,
and is readable without it.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch

from metake import report
from metake.experiments.theory import geometry_of_beta as geometry
from metake.report.theory.interactive import TOLERANCE
from metake.support.errors import ParameterError

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "metake" / "report" / "theory"
SCRIPT = DATA / "geometry_of_beta.js"
OUTPUTS = ("gamma", "beta", "realized", "unrealized", "lower", "upper")
with_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def parts(html: str) -> tuple[dict, str]:
    """The data and the script of a widget."""
    data, script = re.findall(r"<script[^>]*>(.*?)</script>", html, flags=re.DOTALL)
    return json.loads(data), script


@pytest.fixture(scope="module")
def widget() -> report.shown.Shown:
    return report.beta_to_drag(geometry.scene(), geometry.reference_points())


def node(body: str, given: dict) -> object:
    program = (
        f"const {{ reading, deviation }} = require({json.dumps(str(SCRIPT))}); const given = "
        "JSON.parse(require('fs').readFileSync(0)); "
        f"console.log(JSON.stringify({body}))"
    )
    return json.loads(
        subprocess.run(
            ["node", "-e", program], input=json.dumps(given), capture_output=True, text=True, check=True, timeout=60
        ).stdout
    )


# The script and the library


@with_node
def test_the_script_reads_what_the_library_reads(widget):
    scene = parts(widget.html)[0]
    points = geometry.reference_points(dense=True)
    assert (
        len(points) == 2000 and points.feasible.any() and not points.feasible.all() and (points.lower == math.inf).any()
    )
    rows = points.drop(columns=[*OUTPUTS, "feasible"]).to_dict("records")
    found = pd.DataFrame(
        node("given.points.map((p) => reading(given.scene, p))", {"scene": scene, "points": rows})
    ).astype(float)
    for name in OUTPUTS:
        own = found[name].fillna(math.inf)
        same = (own == points[name]) | ((own - points[name]).abs() <= 1e-10 * points[name].abs())
        assert same.all(), f"{name} departs: {points[~same].head(3)}"
    tie = (points.upper / points.lower - 1).abs() < 1e-9  # empty or one point by the last digit
    assert ((found.feasible.astype(bool) == points.feasible) | tie).all() and tie.sum() < 20


@with_node
def test_the_script_finds_itself_in_agreement_and_would_find_a_difference(widget):
    scene = parts(widget.html)[0]
    assert node("deviation(given)", scene) < 1e-12 < TOLERANCE == scene["tolerance"]
    for column in OUTPUTS:
        tampered = json.loads(json.dumps(scene))
        tampered["reference"][-1][column] *= 1 + 1e-6
        assert node("deviation(given)", tampered) > TOLERANCE, column
    for change in (
        {"reference": []}, {"reference": [scene["reference"][0] | {"feasible": True}]}, {"past": [0.5, 0.8]}
    ):
        assert node("deviation(given) > given.tolerance", scene | change), change


def test_the_page_carries_the_library_of_today():
    """The committed picture embeds these readings and this script: no page is left behind."""
    cells = json.loads((ROOT / "notebooks" / "geometry_of_beta.ipynb").read_text("utf-8"))["cells"]
    pages = [
        "".join(o["data"]["text/html"])
        for c in cells
        for o in c.get("outputs", ())
        if 'id="metake-geometry"' in "".join(o.get("data", {}).get("text/html", ""))
    ]
    assert len(pages) == 1
    data, script = parts(pages[0])
    assert script == SCRIPT.read_text("utf-8") and (DATA / "geometry_of_beta.css").read_text("utf-8") in pages[0]
    told, now = pd.DataFrame(data["reference"]), geometry.reference_points()
    assert len(told) == len(now) >= 20 and {0, 3} <= set(told.past) and set(told.method) == {"alphaedit", "memit"}
    for name in OUTPUTS:
        assert told[name].fillna(math.inf).tolist() == pytest.approx(now[name].tolist(), rel=1e-12), name
    assert data["start"] == geometry.START and data["tolerance"] == TOLERANCE


# What it asks of the reader's browser


def test_nothing_comes_from_the_network(widget):
    sources = widget.html.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z]|\bsrc=|\bimport\b|\bfetch\b|XMLHttpRequest|@import|eval\(", sources)
    assert set(re.findall(r"url\(([^)]*)\)", sources)) == {"#mg-clip", "#mg-hatch"}
    assert "innerHTML" not in sources


def test_without_javascript_there_is_a_table(widget):
    assert re.search(r'<div class="mg-live" hidden>', widget.html) and re.search(
        r'class="mg-warning" role="alert" hidden', widget.html
    )
    assert 'class="mg-plain">' in widget.html and widget.html.count("<tr>") == 1 + len(geometry.reference_points())
    assert widget.text.splitlines()[0].endswith("[recomputed here]") and "inf" in widget.text and "<" not in widget.text
    assert widget.text == report.beta_to_drag(geometry.scene(), geometry.reference_points()).text


def test_every_control_has_a_name_and_a_key(widget):
    script = SCRIPT.read_text("utf-8")
    for needed in (
        'role: "slider"', "aria-valuetext", "aria-label", "aria-live", "for: `mg-slider-${i}`", 'type: "range"',
        "legend", "ArrowLeft", "ArrowDown", "touch-action"
    ):
        assert needed in script + (DATA / "geometry_of_beta.css").read_text("utf-8"), needed


def test_a_picture_that_could_not_check_itself_is_refused():
    with pytest.raises(ParameterError, match="no reference points"):
        report.beta_to_drag(geometry.scene(), geometry.reference_points().iloc[:0])
    with pytest.raises(ParameterError, match="no column beta"):
        report.beta_plane(geometry.by_angle().drop(columns="beta"), geometry.scene())


# The geometry


def test_the_preserved_keys_are_exactly_along_the_axes():
    keys = geometry.preserved_keys()
    moment = keys.T @ keys / len(keys)
    assert moment[0, 1] == 0 == moment[1, 0] and moment[1, 1] < geometry.THRESHOLD < moment[0, 0]
    assert geometry.metric("alphaedit", 2.0).apply(torch.eye(2, dtype=torch.float64)).tolist() == [[0, 0], [0, 0.5]]


def test_readings_by_hand():
    """A key of length 2 at 60°: γ = 4 · ¾ / λ; one past key of height ¾ makes λ + 9/16 of it."""
    at = geometry.START | {"planned": 2.0}
    start = geometry.read(**at)
    assert start["gamma"] == pytest.approx(3) and start["beta"] == pytest.approx(0.75)
    assert (start["realized"], start["unrealized"]) == (pytest.approx(1.5), pytest.approx(0.5))
    assert (start["lower"], start["upper"], start["feasible"]) == (pytest.approx(4 / 3), pytest.approx(4), True)
    assert geometry.read(**at | {"past": 1})["gamma"] == pytest.approx(3 / (1 + 9 / 16))
    along = geometry.read(**at | {"x": 2.0, "y": 0.0})
    assert along["gamma"] == 0 and along["lower"] == math.inf and along["upper"] == 1 and not along["feasible"]
    turned = geometry.by_angle()
    for _, group in turned.groupby("method"):
        assert group.gamma.is_monotonic_increasing and (group.lower <= group.upper).equals(group.feasible)
        assert ((group.upper / group.lower - 1).abs() > 0.05).all(), (
            "a drawn interval that is empty or not by a hair would differ between machines"
        )


def test_the_check_beyond_the_plane_holds_and_could_fail(monkeypatch: pytest.MonkeyPatch):
    found = geometry.angle_check(trials=60)
    assert geometry.judge(found)["holds"] is True and set(found.dim) == {2, 16, 64} and {0, 1, 2, 3} == set(found.past)
    assert found.feasible.any() and not found.feasible.all() and found.angle.min() < 10 and found.angle.max() > 60
    pd.testing.assert_frame_equal(found, geometry.angle_check(trials=60), check_exact=True)
    interval, association = geometry.feasible_interval, geometry.association
    monkeypatch.setattr(geometry, "feasible_interval", lambda gamma, tau, epsilon: interval(gamma, 1.5 * tau, epsilon))
    assert geometry.judge(geometry.angle_check(trials=60))["holds"] is False
    monkeypatch.setattr(geometry, "feasible_interval", interval)
    monkeypatch.setattr(geometry, "association", lambda keys, metric: 1.0001 * association(keys, metric))
    wrong = geometry.judge(geometry.angle_check(trials=60))
    assert wrong["holds"] is False and "departs by 1e-04" in wrong["decided_by"]
