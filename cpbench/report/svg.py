"""A figure as an element of a page: an SVG in the page's colours, without style attributes, its ids its own; a picture where it would be too large.

Matplotlib's SVG is styled by attributes that a content security policy forbids. Here styles become attributes, to which page.css gives the
page's colours, and only elements and attributes that draw are kept: labels come from files. What is drawn is decided in cpbench/plot.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final
from xml.etree import ElementTree

from cpbench.report.console import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_MARKS = 400  # of a figure; with more of them a picture of it is smaller
MAX_INCHES = 30  # width of a figure
MAX_FIGURES = 400_000  # characters of all figures of a page
POINTS = 72  # per inch
PICTURE_DOTS, PICTURE_COLOURS = 110, 64  # per inch; more colours would make it three times as large
SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
ELEMENTS: Final = frozenset({"svg", "g", "path", "use", "text", "tspan", "rect", "circle", "line", "polyline", "polygon", "defs", "clipPath", "pattern"})
GEOMETRY: Final = frozenset({"viewBox", "id", "d", "x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "r", "width", "height", "points", "transform", "clip-path"})
PATTERNS: Final = frozenset({"patternUnits"})
PAINT: Final = frozenset({"fill", "fill-opacity", "fill-rule", "stroke", "stroke-width", "stroke-opacity", "stroke-linecap", "stroke-linejoin"})
LINES: Final = frozenset({"stroke-miterlimit", "stroke-dasharray", "stroke-dashoffset", "opacity"})
FONTS: Final = frozenset({"text-anchor", "font-size", "font-weight", "font-style"})
KEPT: Final = GEOMETRY | PATTERNS | PAINT | LINES | FONTS
REFERENCE = re.compile(r"url\(#([^)]+)\)")
FONT = re.compile(r"([\d.]+)px")
LONG_NUMBER = re.compile(r"\d+\.\d{3,}")


def elements(charts: Mapping[str, Figure]) -> tuple[dict[str, str], list[str]]:
    """Every figure as an element by its name, and the names of those that the page has no room for."""
    made: dict[str, str] = {}
    left_out = []
    for number, (name, chart) in enumerate(charts.items()):
        fits = chart.get_figwidth() <= MAX_INCHES  # drawing a wider one takes long, and nobody could read it
        element = _element(chart, chart.get_suptitle().partition("\n")[0] or name, number) if fits else ""
        if fits and len(element) + sum(map(len, made.values())) <= MAX_FIGURES:
            made[name] = element
        else:
            left_out.append(name)
    return made, left_out


def _element(chart: Figure, title: str, number: int) -> str:
    from cpbench.plot.canvas import svg

    if sum(len(axes.get_children()) for axes in chart.axes) > MAX_MARKS:
        return _picture(chart, title)
    return cleaned(svg(chart), title, f"f{number}-")


def _picture(chart: Figure, title: str) -> str:
    from PIL import Image

    from cpbench.plot.canvas import drawing

    painted, packed = io.BytesIO(), io.BytesIO()
    with drawing():
        chart.savefig(painted, format="png", dpi=PICTURE_DOTS)
    with Image.open(painted) as image:
        image.convert("RGB").quantize(PICTURE_COLOURS, dither=Image.Dither.NONE).save(packed, format="png", optimize=True)
    wide = round(POINTS * chart.get_figwidth() * 4 / 3)
    return f'<img width="{wide}" alt="{html.escape(plain(title).plain)}" src="data:image/png;base64,{base64.b64encode(packed.getvalue()).decode()}">'


def cleaned(document: str, title: str, prefix: str) -> str:
    """An SVG document as an element for a page, named by `title` for those who cannot see it; all ids get the prefix."""
    root = ElementTree.fromstring(document)
    used = set(_references(root))
    made = _copy(root, prefix, used)
    made.attrib = {"viewBox": root.get("viewBox", ""), "role": "img", "aria-label": plain(title).plain, "font-family": "sans-serif"}
    made.attrib |= {
        "width": f"{float(root.get('width', '0').removesuffix('pt')) * 4 / 3:.0f}",
        "stroke-linejoin": "round",
        "stroke-linecap": "butt",
    }  # joins and ends are those of matplotlib's own style sheet
    return ElementTree.tostring(made, encoding="unicode")


def _references(root: ElementTree.Element) -> Iterator[str]:
    """Ids that something refers to."""
    for element in root.iter():
        yield element.get(f"{XLINK}href", "").removeprefix("#")
        for value in element.attrib.values():
            yield from REFERENCE.findall(value)


def _copy(element: ElementTree.Element, prefix: str, used: set[str]) -> ElementTree.Element:
    """An element with those below it that draw something."""
    copied = ElementTree.Element(element.tag.removeprefix(SVG), _attributes(element, prefix, used))
    copied.text = plain(element.text.strip("\n")).plain if element.text and element.text.strip() else None
    copied.extend(_copy(child, prefix, used) for child in element if isinstance(child.tag, str) and child.tag.removeprefix(SVG) in ELEMENTS)
    return copied


def _attributes(element: ElementTree.Element, prefix: str, used: set[str]) -> dict[str, str]:
    given = {name: value for name, value in element.attrib.items() if name in KEPT}
    for declaration in element.get("style", "").split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font" and (size := FONT.search(value)):
            given["font-size"] = size[1]
            given |= {"font-weight": "bold"} if {"bold", "700"} & set(value.split()) else {}
            given |= {"font-style": "italic"} if "italic" in value.split() else {}
        elif name in KEPT:
            given[name] = value.removesuffix("px")
    if given.get("id") not in used:
        given.pop("id", None)
    if (target := element.get(f"{XLINK}href", "")).startswith("#"):
        given["href"] = f"#{prefix}{target[1:]}"
    return {name: f"{prefix}{value}" if name == "id" else _short(REFERENCE.sub(rf"url(#{prefix}\1)", value)) for name, value in given.items()}


def _short(value: str) -> str:
    """Numbers to a hundredth of a point, and one space between them."""
    return " ".join(LONG_NUMBER.sub(lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value).split())
