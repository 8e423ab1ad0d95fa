"""The same drawing in a third of the bytes: nothing that a reader sees or points at is lost.

matplotlib writes every mark with its whole look, its clip and six decimals, and names every group. Here numbers are
rounded to 1/100 point, only what is referred to keeps a name, marks of one look share it, and a PNG takes 256 colors
where that does not show.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from itertools import groupby
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from PIL import Image

SPACE = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"
REFERENCE = re.compile(r'(url\(#|href="#)([^")]+)')
NUMBER = re.compile(r"-?\d+\.\d+")
MEASURES = ("d", "x", "y", "width", "height", "transform")
TEXTS = ("text", "tspan", "title", "style")
# What a group hands down to its members. Not so opacity and clip-path, which are of the group as a whole.
INHERITED = ("fill", "fill-opacity", "stroke", "stroke-opacity", "stroke-width", "stroke-linecap", "stroke-linejoin")
FAR, FEW = 32, 0.003  # a PNG's colors: how many of 255 steps a pixel may be off, unless it is one of few


def lean(svg: str) -> str:
    """A drawing of matplotlib's, its marks titled or not, in fewer bytes."""
    names = {name: f"m{i}" for i, name in enumerate(dict.fromkeys(name for _, name in REFERENCE.findall(svg)))}
    root = ElementTree.fromstring(REFERENCE.sub(lambda found: found[1] + names[found[2]], svg))
    root.set("xmlns", SPACE[1:-1])
    for element in root.iter():
        element.tag = element.tag.removeprefix(SPACE)
        if element is not root:
            _attributes(element, names)
    _members(root)
    return ElementTree.tostring(root, encoding="unicode").replace(" />", "/>")


def _attributes(element: Element, names: dict[str, str]) -> None:
    """Names that are referred to, the plain `href` that every browser knows, and numbers as exact as one can see."""
    given = dict(element.attrib)
    name = names.get(given.pop("id", ""))
    link = "".join(given.pop(LINK, "").split())  # an image's data come in lines
    if element.tag != "image":  # it is scaled: its numbers are no lengths
        given |= {k: _rounded(given[k]) for k in MEASURES if k in given and "scale" not in given[k]}
    if given.get("transform", "").startswith("rotate(0 "):
        del given["transform"]
    if "d" in given:
        given["d"] = _path(given["d"])
    element.attrib.clear()
    element.attrib |= ({"id": name} if name else {}) | ({"href": link} if link else {}) | given


def _rounded(text: str) -> str:
    return re.sub(r"-0(?![.\d])", "0", NUMBER.sub(lambda n: f"{float(n[0]):.2f}".rstrip("0").rstrip("."), text))


def _path(d: str) -> str:
    """A path without line breaks, and without the letters that the one before implies."""
    found, last = [], ""
    for letter, numbers in re.findall(r"([A-Za-z])([^A-Za-z]*)", d):
        implied = letter == last != "M" or (last, letter) == ("M", "L")
        found.append((" " if implied else letter) + " ".join(numbers.split()))
        last = letter
    return "".join(found)


def _members(group: Element) -> None:
    """What a group holds: groups that say nothing opened, neighbors under one clip joined, marks of one look together.
    """
    if group.tag in TEXTS:
        return
    group.text = None
    members: list[Element] = []
    for child in group:
        child.tail = None
        _members(child)
        for one in list(child) if child.tag == "g" and not child.attrib else [child]:
            if members and one.tag == "g" and one.attrib == members[-1].attrib and list(one.attrib) == ["clip-path"]:
                members[-1].extend(list(one))
            elif one.tag != "defs" or len(one):
                members.append(one)
    group[:] = members if group.tag == "defs" else _together(members)
    if group.tag == "g" and [e.tag for e in group] == ["g"] and not group.attrib.keys() & group[0].attrib.keys():
        group.attrib |= group[0].attrib
        group[:] = list(group[0])


def _together(members: Iterable[Element]) -> list[Element]:
    """Marks of one look that follow each other, in a group that has it."""
    found: list[Element] = []
    for (tag, look), run in groupby(members, lambda e: (e.tag, e.get("style", "") if e.tag == "use" else None)):
        marks = list(run)
        parts = [part for part in (look or "").split("; ") if part]
        handed = [part for part in parts if part.partition(":")[0] in INHERITED]
        if tag != "use" or len(marks) == 1 or not handed:
            found += marks
            continue
        own = "; ".join(part for part in parts if part not in handed)
        for mark in marks:
            del mark.attrib["style"]
            if own:
                mark.set("style", own)
        found.append(Element("g", {"style": "; ".join(handed)}))
        found[-1].extend(marks)
    return found


def paletted(png: bytes, dpi: int) -> bytes:
    """An opaque image in the 256 colors that it has most of, each as it was; in all of them where one would see it."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    small = image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    places = Image.frombytes("L", small.size, small.tobytes())
    # (how often, (red, green, blue, place in the palette)): the palette has means, here it gets its places' commonest
    counted = sorted(Image.merge("RGBA", (*image.split(), places)).getcolors(image.width * image.height))
    colors = {color[3]: color[:3] for _, color in counted}
    far = sum(n for n, (*c, p) in counted if max(abs(a - b) for a, b in zip(c, colors[p], strict=True)) > FAR)
    small.putpalette([part for place in range(256) for part in colors.get(place, (0, 0, 0))])
    written = io.BytesIO()
    chosen = small if far <= FEW * image.width * image.height else image
    chosen.save(written, "png", dpi=(dpi, dpi), optimize=True)
    return written.getvalue()
