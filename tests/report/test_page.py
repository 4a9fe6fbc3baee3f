from __future__ import annotations

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sd_tokenmerge.report.cells import TextTable, listing, pivots
from sd_tokenmerge.report.page import LARGE_BYTES, Page, Picture, page_html
from sd_tokenmerge.report.published import atc_table2
from tests.report.example import CONDITIONS, example_rows
from tests.report.html_document import parse

ODD = "<script>a:b alert('$x$ & \"#1\"')</script> \\frac{{1}} {% if %} é"


def encoded(kind: str, width: int = 30, height: int = 20) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))


PAGE = Page(
    title="A title",
    lead=["First.", "Second."],
    pictures=[Picture("A plot", "plot.png", encoded("PNG"), is_plot=True)],
    tables=[*pivots(example_rows()), listing(example_rows())],
    notes=["A note."],
    settings=CONDITIONS,
    versions={"torch": "2.13.0"},
)


def test_everything_is_on_the_page():
    document = parse(page_html(PAGE))
    assert document.texts("h1") == document.texts("title") == ["A title"]
    assert document.texts("h2") == ["Pictures", "Tables", "Notes", "Settings", "Versions"]
    assert document.texts("h3") == [table.title for table in PAGE.tables]
    assert {"First.", "Second."} < {*document.texts("p")}
    assert document.texts("li") == ["A note."]
    assert document.texts("dt") == [*CONDITIONS, "torch"]
    assert document.texts("dd") == [*CONDITIONS.values(), "2.13.0"]


def test_tables_hold_every_cell():
    table = TextTable("t", ["a", "b"], [["x", "1"], None, ["y", "2"], ["z", "3"]], {(2, 1)})
    document = parse(page_html(replace(PAGE, tables=[table], pictures=[])))
    assert document.texts("th") == ["a", "b", "x", "y", "z"]
    assert document.texts("td") == ["1", "2", "3"]
    assert document.texts("b") == ["2"]
    assert len(document.texts("tbody")) == 2, "measured and published"
    assert "Bold: lowest of its column, significant or not." in document.texts("p")
    rows = example_rows()
    for one in (*pivots(rows, atc_table2()), listing(rows)):
        cells = parse(page_html(replace(PAGE, tables=[one]))).texts("td")
        assert cells == [text for line in one.body if line for text in line[1:]]


def test_text_is_never_markup():
    page = Page(
        title=ODD,
        lead=[ODD],
        pictures=[Picture(ODD, ODD, encoded("PNG")), Picture(ODD, ODD, None)],
        tables=[TextTable(ODD, [ODD, ODD], [[ODD, ODD]], frozenset({(0, 1)}))],
        notes=[ODD],
        settings={ODD: ODD},
        versions={ODD: ODD},
    )
    html = page_html(page)
    document = parse(html)
    assert not document.texts("script")
    assert b"<script" not in html
    for tag in ("title", "h1", "h3", "li", "dt", "dd", "th", "td"):
        assert {*document.texts(tag)} == {ODD}, tag
    assert document.attributes("img", "alt") == [ODD]


def test_lone_surrogates_are_replaced():
    assert parse(page_html(replace(PAGE, title="a\udcffb"))).texts("h1") == ["a?b"]


def test_pictures_are_inside_the_page_and_open_in_full_size():
    jpeg = Picture("A sheet", "sheet.jpg", encoded("JPEG"))
    document = parse(page_html(replace(PAGE, pictures=[*PAGE.pictures, jpeg])))
    for picture, uri, kind in zip(
        [*PAGE.pictures, jpeg], document.attributes("img", "src"), ("png", "jpeg"), strict=True
    ):
        assert uri.startswith(f"data:image/{kind};base64,")
        assert base64.b64decode(uri.partition("base64,")[2]) == picture.data
    assert document.attributes("img", "width") == ["30", "30"]
    assert document.attributes("img", "height") == ["20", "20"]
    assert len(document.texts("details")) == len(document.texts("summary")) == 2
    assert document.attributes("details", "open") == []


def test_nothing_is_loaded():
    html = page_html(PAGE)
    document = parse(html)
    for tag in ("script", "link", "iframe", "object", "embed", "base", "a"):
        assert not document.texts(tag), tag
    loading = {"src", "href", "srcset", "poster", "action", "background", "data"}
    assert {name for _, name, _ in document.all_attributes if name in loading} == {"src"}
    assert not [name for _, name, _ in document.all_attributes if name.startswith("on")]
    (style,) = document.texts("style")
    assert re.search(r"url\(|@import|//", style) is None
    policies = [text for text in document.attributes("meta", "content") if "default-src" in text]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_large_pictures_become_smaller_with_the_same_pixels():
    data = encoded("PNG", 800, 600)
    assert len(data) > LARGE_BYTES
    document = parse(page_html(replace(PAGE, pictures=[Picture("p", "p.png", data)])))
    (uri,) = document.attributes("img", "src")
    assert len(uri) < len(data) / 2
    with decoded(uri) as image:
        assert (image.format, image.size) == ("JPEG", (800, 600))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<svg onload='alert(1)'/>",
        encoded("PNG")[:-40],
        encoded("PNG")[:20],
        encoded("JPEG")[:300],
        encoded("GIF"),
    ],
)
def test_damaged_pictures_are_left_out(data, tmp_path):
    (tmp_path / "damaged.png").write_bytes(data)
    pictures = [
        Picture.read("Damaged", tmp_path / "damaged.png"),
        Picture.read("Missing", tmp_path / "missing.png"),
        *PAGE.pictures,
    ]
    document = parse(page_html(replace(PAGE, pictures=pictures)))
    assert document.attributes("img", "alt") == ["A plot"]
    for title, name in (("Damaged", "damaged.png"), ("Missing", "missing.png")):
        assert f"{title}: left out, since {name} is missing or damaged." in document.texts("p")


def test_empty_parts_are_left_out():
    document = parse(page_html(replace(PAGE, pictures=[], notes=[])))
    assert document.texts("h2") == ["Tables", "Settings", "Versions"]


def test_the_same_content_gives_the_same_bytes():
    assert page_html(PAGE) == page_html(replace(PAGE))
