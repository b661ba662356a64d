"""A figure as an element of a page: what is kept of it, its ids, its numbers, and when it becomes a picture."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from matplotlib.figure import Figure

from cpbench.plot.canvas import sheet, svg
from cpbench.report.svg import MAX_FIGURES, MAX_INCHES, MAX_MARKS, cleaned, elements

HEAD = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="72pt" viewBox="0 0 72 72">'


def chart(points: int, title: str = "TTFT <b>") -> Figure:
    made, (axes,) = sheet(title, ["<script>"])
    for point in range(points):
        axes.plot(point, point, "o")
    return made


def test_styles_become_attributes_and_numbers_are_short() -> None:
    made = cleaned(f'{HEAD}<path d="M 1.234567 2\nL 3 4 " style="fill: #ff0000; stroke-width: 0.8px; position: fixed"/></svg>', "T", "f0-")
    assert '<path d="M 1.23 2 L 3 4" fill="#ff0000" stroke-width="0.8" />' in made
    assert 'width="96"' in made and 'aria-label="T"' in made


def test_only_what_draws_is_kept() -> None:
    hostile = '<script>x</script><g onclick="x"><a xlink:href="javascript:x"><text>a</text></a><use xlink:href="https://x/y#z"/><foreignObject/></g>'
    made = cleaned(f"{HEAD}{hostile}<style>*{{}}</style><!-- c --></svg>", '"><script>', "f0-")
    assert re.findall(r"<(\w+)", made) == ["svg", "g", "use"]
    assert "onclick" not in made and "https" not in made.replace("http://www.w3.org/2000/svg", "")


def test_ids_are_those_of_the_figure_and_only_where_they_are_used() -> None:
    body = '<defs><clipPath id="p"><rect width="1" height="1"/></clipPath><path id="m" d="M 0 0"/></defs>'
    body += '<g id="axes_1" clip-path="url(#p)"><use xlink:href="#m"/></g>'
    made = cleaned(f"{HEAD}{body}</svg>", "T", "f7-")
    assert re.findall(r' id="([^"]+)"', made) == ["f7-p", "f7-m"]
    assert 'clip-path="url(#f7-p)"' in made and 'href="#f7-m"' in made


def test_a_real_figure_has_no_style_and_keeps_its_texts() -> None:
    made = cleaned(svg(chart(3)), "T", "f0-")
    root = ElementTree.fromstring(made)
    assert not root.findall(".//*[@style]") and "<style" not in made
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert "TTFT <b>" in texts and "<script>" in texts


def test_many_marks_become_a_picture_and_too_much_is_left_out() -> None:
    wide = chart(1, "wide")
    wide.set_figwidth(MAX_INCHES + 1)
    made, left_out = elements({"few": chart(1), "many": chart(MAX_MARKS), "wide": wide})
    assert made["few"].startswith("<svg") and made["many"].startswith('<img width="')
    assert 'alt="TTFT &lt;b&gt;"' in made["many"]
    assert left_out == ["wide"] and sum(map(len, made.values())) < MAX_FIGURES
