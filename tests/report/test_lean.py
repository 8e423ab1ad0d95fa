"""A lean drawing is the drawing: every shape with the look, the clip and the place that matplotlib gave it."""

import base64
import io
import re
from xml.etree import ElementTree

import matplotlib.patches
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from metake.report import figure as module
from metake.report.figure import Figure
from metake.report.lean import FAR, FEW, lean, paletted

pytestmark = pytest.mark.usefixtures("project")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
WHOLE = ("opacity", "clip-path")  # act on a group as a whole: not handed down to what is in it
REFERS = {name: re.compile(form) for name, form in {"href": r"^#(.*)", "clip": r"^url\(#(.*)\)$"}.items()}


def styled(text):
    return dict(part.strip().split(": ", 1) for part in text.split(";") if part.strip())


def shape(d):
    """A path's commands with their letters written out, and its numbers."""
    found, last = [], ""
    for letter, numbers in re.findall(r"([A-Za-z])([^A-Za-z]*)", d):
        values = list(map(float, NUMBER.findall(numbers)))
        size = {"M": 2, "L": 2, "C": 6, "Q": 4, "z": 0}[letter]
        for k in range(0, len(values), size) if size else [0]:
            found.append(("L" if letter == "M" and k else letter, values[k : k + size]))
        last = letter
    return "".join(c for c, _ in found), [v for _, numbers in found for v in numbers], last


class Drawn:
    """What a renderer draws of an SVG, in order: shapes with look, clips and place; and what is written."""

    def __init__(self, svg):
        root = ElementTree.fromstring(svg)
        for element in root.iter():
            element.tag = element.tag.rpartition("}")[2]
            element.attrib = {k.rpartition("}")[2]: v for k, v in element.attrib.items()}
        self.named = {e.get("id"): e for e in root.iter() if e.get("id")}
        self.shapes, self.numbers = [], []
        self.walk(root, {}, ())

    def walk(self, element, look, clips):
        if element.tag in ("defs", "style", "metadata"):
            return
        own = styled(element.get("style", ""))
        look = {k: v for k, v in look.items() if k not in WHOLE} | own
        if clip := REFERS["clip"].match(element.get("clip-path", "")):
            clips = (*clips, clip[1])
        if element.tag in ("g", "svg") and "transform" not in element.attrib:
            assert "opacity" not in own, "of marks that overlap, not the same as of each"
            for child in element:
                self.walk(child, look, clips)
            return
        self.shape(element, look, clips)

    def shape(self, element, look, clips):
        told = [element.tag, sorted(self.resolved(look).items())]
        for clip in dict.fromkeys(clips):
            told.append(self.measures(self.named[clip][0]))
        told += [self.measures(element), "".join(element.itertext()).strip()]
        if element.tag == "use":
            told.append(self.measures(self.named[REFERS["href"].match(element.get("href"))[1]]))
        for child in element.iter() if element.tag in ("text", "g") else ():
            told.append((child.tag, sorted(styled(child.get("style", "")).items()), self.measures(child)))
        self.shapes.append(told)

    def resolved(self, look):
        """A pattern by what it is made of."""
        found = {k: REFERS["clip"].match(v) for k, v in look.items()}
        return {k: ElementTree.tostring(self.named[m[1]])[:9] if (m := found[k]) else v for k, v in look.items()}

    def measures(self, element):
        """An element's own attributes: texts here, lengths into one list."""
        texts = []
        for key, value in sorted(element.attrib.items()):
            if key == "d":
                commands, numbers, _ = shape(value)
                texts.append(commands)
                self.numbers += numbers
            elif key in ("x", "y", "width", "height"):
                self.numbers += map(float, NUMBER.findall(value))
            elif key == "transform" and float(NUMBER.search(value)[0]):
                texts.append(re.sub(NUMBER, "#", value))
                self.numbers += map(float, NUMBER.findall(value))
            elif key == "href" and value.startswith("data:"):
                texts.append(base64.b64decode("".join(value.partition(",")[2].split())))
        return texts


def both(monkeypatch, draw, **panels):
    """A drawing as matplotlib wrote it, with its titles, and what becomes of it."""
    kept = []
    monkeypatch.setattr(module, "lean", lambda svg: kept.append(svg) or lean(svg))
    shown = Figure(draw, pd.DataFrame({"row": [1]}), "drawn", "A drawing.", **panels)
    return kept[0], lean(kept[0]), shown


def everything(axes):
    """All kinds of marks that the pages draw, and some more."""
    rng = np.random.default_rng(0)
    first, second = axes[0]
    sizes, colors = rng.integers(9, 80, 40), rng.random(40)
    first.scatter(*rng.random((2, 40)), s=sizes, c=colors, alpha=0.4, label="sizes & <colors>")
    first.scatter(*rng.random((2, 40)), marker="^", color="#00a76b", edgecolor="#1f2328", label="one look")
    first.plot([0, 0.5, np.nan, 0.7, 1], [0, 1, 0, 0.2, 0.1], marker="x", linestyle="--", label="gap")
    first.plot(np.linspace(0, 1, 50), rng.random(50), alpha=0.3)
    first.set(xlabel=r"$\gamma_{i}^2$ of a  request", title="E ≤ ∞", ylim=(-0.1, 1.1))
    first.add_patch(matplotlib.patches.Ellipse((0.5, 0.5), 0.4, 0.2, angle=30, hatch="//", fill=False, alpha=0.5))
    first.annotate("there", (0.2, 0.3), (0.5, 0.8), arrowprops={"arrowstyle": "->"}, rotation=45)
    second.imshow(rng.random((5, 7)), aspect="auto", extent=(0.01, 10, -1, 1), alpha=0.7)
    second.scatter(rng.random(30) * 9, rng.random(30), color="#c70a2c", rasterized=True)
    second.bar([1, 2, 3], [0.5, -0.25, 1], label="bars", hatch="xx", color="none", edgecolor="#3355bb")
    second.fill_between([0.01, 5, 10], [-0.5, -0.2, -0.9], -1, alpha=0.2)
    second.errorbar([2, 4], [0.1, 0.2], yerr=0.3, fmt="s", capsize=3)
    second.legend(loc="lower left")
    second.set(xscale="log")


def test_every_shape_keeps_look_clip_and_place(monkeypatch):
    before, after, shown = both(monkeypatch, everything, ncols=2)
    found, expected = Drawn(after), Drawn(before)
    assert len(expected.shapes) > 150 and {"path", "use", "text", "image", "g"} <= {told[0] for told in expected.shapes}
    assert found.shapes == expected.shapes
    assert np.allclose(found.numbers, expected.numbers, rtol=0, atol=0.00501)
    assert not np.array_equal(found.numbers, expected.numbers)
    titles = re.findall(r"<title>(.*?)</title>", before)
    assert len(titles) > 40 and re.findall(r"<title>(.*?)</title>", after) == titles
    for theme in ("light", "dark"):
        assert len(Drawn(shown.svg[theme]).shapes) == len(expected.shapes)


@pytest.mark.parametrize("marks", [400, 3000])
def test_a_mark_costs_few_bytes(marks, monkeypatch):
    places = np.random.default_rng(0).random((2, marks))
    before, after, shown = both(monkeypatch, lambda axes: axes.scatter(*places, color="#00a76b", alpha=0.5))
    untold = [re.sub(r"<title>.*?</title>", "", svg) for svg in (before, after, shown.html)]
    assert len(untold[0]) > 140 * marks and len(untold[1]) < 48 * marks + 9000 and len(untold[2]) < 56 * marks + 10_000


def test_only_what_is_referred_to_has_a_name(monkeypatch):
    _, after, shown = both(monkeypatch, everything, ncols=2)
    for svg in (after, shown.svg["light"], shown.svg["dark"]):
        names = set(re.findall(r'\bid="([^"]+)"', svg)) - {"drawn-light", "drawn-dark"}
        assert names == set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg)) and names


def png(pixels):
    written = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(written, "png", dpi=(200, 200))
    return written.getvalue()


def read(written):
    image = Image.open(io.BytesIO(written))
    return image, np.asarray(image.convert("RGB")).astype(int)


def test_an_image_of_few_colors_keeps_each():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (200, 3))[rng.integers(0, 200, (90, 120))]
    image, found = read(paletted(png(pixels), 200))
    # colors so near that they share a place differ by less than one sees
    assert image.mode == "P" and np.abs(found - pixels).max() <= FAR and round(image.info["dpi"][0]) == 200


def test_paper_and_ink_stay_exact_in_a_drawing(monkeypatch, project):
    seen = []
    monkeypatch.setattr(module, "paletted", lambda raw, dpi: seen.append(raw) or paletted(raw, dpi))
    Figure(everything, pd.DataFrame({"row": [1]}), "drawn", "A drawing.", ncols=2)
    image, found = read((project / "_build" / "figures" / "drawn.png").read_bytes())
    _, expected = read(seen[0])
    assert image.mode == "P" and image.size == (1440, 720)
    for color in ((255, 255, 255), (31, 35, 40)):
        where = (expected == color).all(-1)
        assert where.sum() > 500 and (found[where] == color).all()
    assert (np.abs(found - expected).max(-1) > FAR).mean() <= FEW
    assert len((project / "_build" / "figures" / "drawn.png").read_bytes()) < 0.6 * len(seen[0])


def test_an_image_of_many_colors_keeps_them():
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3))
    image, found = read(paletted(png(pixels), 200))
    assert image.mode == "RGB" and np.array_equal(found, pixels) and round(image.info["dpi"][0]) == 200
