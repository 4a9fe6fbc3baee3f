"""Results as one HTML page that loads nothing: tables, pictures, settings and versions."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import jinja2
from PIL import Image

from sd_tokenmerge.fid.images import DECODING_ERRORS
from sd_tokenmerge.report.cells import TextTable

LARGE_BYTES = 1_000_000
"""A picture with more bytes is embedded as JPEG, with the same number of pixels."""


@dataclass(frozen=True)
class Picture:
    """A picture on the page.

    Attributes:
        title: printed above it.
        name: its file name.
        data: the bytes of a PNG or JPEG file; None if it could not be read.
        is_plot: whether it is a plot, which is shown with inverted brightness in dark mode.
    """

    title: str
    name: str
    data: bytes | None
    is_plot: bool = False

    @classmethod
    def read(cls, title: str, path: Path, *, is_plot: bool = False) -> Picture:
        """The picture in a file, without `data` if the file cannot be read."""
        try:
            data = path.read_bytes()
        except OSError:
            data = None
        return cls(title, path.name, data, is_plot)


@dataclass(frozen=True)
class Page:
    """The content of a page. All of it is plain text, in which HTML has no meaning.

    Attributes:
        title: heading of the page.
        lead: paragraphs below the title.
        pictures: those that are missing or damaged are replaced by a sentence.
        tables: in their order.
        notes: sentences below the tables.
        settings: values by name.
        versions: of libraries, by name.
    """

    title: str
    lead: Sequence[str]
    pictures: Sequence[Picture]
    tables: Sequence[TextTable]
    settings: Mapping[str, str]
    versions: Mapping[str, str]
    notes: Sequence[str] = field(default=())


def page_html(page: Page) -> bytes:
    """Draw a page as an HTML document in UTF-8.

    The document has no scripts and loads no other files. The same content gives the same bytes.
    """
    text = _template().render(
        page=page,
        pictures=[(picture, _embed(picture.data)) for picture in page.pictures],
        tables=[(table, _parts(table)) for table in page.tables],
    )
    return text.encode(errors="replace")  # file names may hold lone surrogates


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.jinja")


@dataclass(frozen=True)
class _Embedded:
    uri: str
    width: int
    height: int


def _embed(data: bytes | None) -> _Embedded | None:
    """A picture as a data URI; None if it is missing or damaged."""
    if data is None:
        return None
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            image.load()
            kind, (width, height) = str(image.format), image.size
            if len(data) > LARGE_BYTES and kind != "JPEG":
                kind, out = "JPEG", io.BytesIO()
                image.convert("RGB").save(out, "JPEG", quality=85, optimize=True)
                data = out.getvalue()
    except DECODING_ERRORS:
        return None
    uri = f"data:{Image.MIME[kind]};base64,{base64.b64encode(data).decode()}"
    return _Embedded(uri, width, height)


def _parts(table: TextTable) -> list[list[list[tuple[str, bool]]]]:
    """The parts of a table's body that `None` separates, as lines of `(text, is bold)`."""
    parts: list[list[list[tuple[str, bool]]]] = [[]]
    for i, line in enumerate(table.body):
        if line is None:
            parts.append([])
        else:
            parts[-1].append([(text, (i, j) in table.bold) for j, text in enumerate(line)])
    return parts
