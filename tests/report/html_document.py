"""The elements of an HTML document, for tests."""

from __future__ import annotations

from html.parser import HTMLParser

_EMPTY = {"img", "meta", "link", "base", "embed", "wbr"}


class Document(HTMLParser):
    """Collects text and attributes; every element must be closed in order.

    Attributes:
        all_attributes: `(tag, name, value)` in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.all_attributes: list[tuple[str, str, str | None]] = []
        self.open: list[tuple[str, int]] = []
        self._found: list[tuple[str, str]] = []
        self._elements: list[list[str]] = []

    def handle_starttag(self, tag, attrs):
        self.all_attributes += [(tag, name, value) for name, value in attrs]
        self._found.append((tag, ""))
        self._elements.append([])
        if tag not in _EMPTY:
            self.open.append((tag, len(self._elements) - 1))

    def handle_endtag(self, tag):
        opened, index = self.open.pop()
        assert opened == tag
        self._found[index] = tag, " ".join("".join(self._elements[index]).split())

    def handle_data(self, data):
        for _, index in self.open:
            self._elements[index].append(data)

    def texts(self, tag: str) -> list[str]:
        """The text of each element with this tag, with single spaces."""
        return [text for found, text in self._found if found == tag]

    def attributes(self, tag: str, name: str) -> list[str | None]:
        """The values of an attribute."""
        return [value for one, key, value in self.all_attributes if (one, key) == (tag, name)]


def parse(html: bytes) -> Document:
    document = Document()
    document.feed(html.decode())
    document.close()
    assert not document.open
    return document
