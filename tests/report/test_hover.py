"""Every mark of a drawing says its own numbers: those of its record, whatever the scale, the order and the panel."""

import re
from html import unescape

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metake import report
from metake.report import hover
from metake.report.figure import Figure

pytestmark = pytest.mark.usefixtures("project")
TITLE = re.compile(r"<title>(.*?)</title>")


def titles(draw, rows=1, **panels):
    shown = Figure(draw, pd.DataFrame({"row": range(rows)}), "hovered", "A drawing.", **panels)
    assert TITLE.findall(shown.svg["light"]) == TITLE.findall(shown.svg["dark"])
    return [unescape(text) for text in TITLE.findall(shown.svg["light"])]


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(-50, 50)), min_size=1, max_size=8),
    st.sampled_from(["linear", "log"]),
)
def test_a_mark_says_where_it_stands(points, scale):
    xs, ys = zip(*points, strict=True)

    def draw(axes):
        axes.scatter(xs, ys, label="one")
        axes.plot(xs, [y + 1 for y in ys], marker="s", label="_two")
        axes.set(xscale=scale, xlabel="γ", ylabel="β", xlim=(5e-4, 2e3), ylim=(-60, 60))

    found = titles(draw)
    told = [list(map(float, re.fullmatch(r"(?:one, )?γ (\S+), β (\S+)", text).groups())) for text in found]
    assert np.allclose(told, np.column_stack([xs + xs, ys + tuple(y + 1 for y in ys)]), rtol=1e-3, atol=2e-3), (
        "in the order of drawing"
    )
    assert [text.startswith("one, ") for text in found] == [True] * len(xs) + [False] * len(xs)


def test_a_row_is_told_by_its_name_also_where_the_panel_shows_none():
    records = pd.DataFrame(
        [
            {"dataset": d, "method": m, "efficacy": v, "generalization": v / 2}
            for d in ("A", "B")
            for m, v in (("pre-edit", 3.0), ("memit", 40.0), ("metake", 91.5))
        ]
    )
    shown = report.comparison_dots(records, ("efficacy", "generalization"))
    found = TITLE.findall(shown.svg["light"])
    assert (
        found == ["pre-edit, 3", "MEMIT, 40", "MetaKE, 91.5"] * 2 + ["pre-edit, 1.5", "MEMIT, 20", "MetaKE, 45.75"] * 2
    )


def test_bars_say_their_length():
    records = pd.DataFrame(
        [
            {"prompt": "2 < 3", "answer": "a", "before": 0.25, "after": 0.0},
            {"prompt": "q", "answer": "b", "before": 1e-5, "after": 1.0},
        ]
    )
    found = [unescape(text) for text in TITLE.findall(report.before_after(records).svg["light"])]
    expected = [
        ("before the edit", "2 < 3 … a", "0.25"), ("before the edit", "q … b", "1e-05"), ("after", "2 < 3 … a", "0"),
        ("after", "q … b", "1")
    ]
    assert found == [f"{label}, {name}, probability of the answer {value}" for label, name, value in expected]


def test_points_outside_the_axes_and_gaps_shift_nothing():
    def draw(axes):
        axes.plot([1, 2, np.nan, 4, 99], [1, 2, 3, 4, 5], marker="o")
        axes.set(xlim=(0, 5), ylim=(0, 6), xlabel="x", ylabel="y")

    found = titles(draw)
    assert found[:3] == ["x 1, y 1", "x 2, y 2", "x 4, y 4"] and len(found) <= 4


def test_of_too_many_marks_none_is_told():
    assert len(titles(lambda axes: axes.scatter(range(hover.MOST), range(hover.MOST)))) == hover.MOST
    assert titles(lambda axes: axes.scatter(range(hover.MOST + 1), range(hover.MOST + 1))) == []

    def draw(axes):
        for start in (0, 10):
            axes.scatter(range(hover.MOST - 9), range(hover.MOST - 9), label="cloud")
            axes.plot([start, start + 1], [1, 2], marker="o", label="means")

    assert [text.partition(",")[0] for text in titles(draw)] == ["means"] * 4, (
        "of a drawing with clouds what is few, and no cloud in part"
    )


def test_remarks_under_an_axis_are_not_repeated():
    assert titles(
        lambda axes: (axes.plot([1], [2], marker="o"), axes.set(xlabel="AUROC\none of them too one-sided", ylabel="y"))
    ) == ["AUROC 1, y 2"]


def test_lines_without_marks_and_marks_of_the_frame_stay_silent():
    def draw(axes):
        axes.plot([0, 1], [0, 1], label="a line")
        axes.axhline(0.5)
        axes.plot([0.5], [0.5], marker="o", transform=axes.transAxes)

    assert titles(draw) == []
