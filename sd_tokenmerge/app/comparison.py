"""Pictures of one prompt by several methods, forms and keep rates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from PIL import Image

from sd_tokenmerge.app.studio import MergedPicture, OnStep, Picture, Studio
from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.fid.image_change import psnr
from sd_tokenmerge.files import describe_error
from sd_tokenmerge.report.cells import number
from sd_tokenmerge.report.contact_sheet import PictureGrid, contact_sheet

_CELL = 256
"""Height and width in pixels of a picture on the sheet."""


class Setting(NamedTuple):
    """How the tokens of one picture are merged; the fields are those of `MergeConfig`."""

    method: str
    merge: str
    keep_rate: str


class Comparison:
    """Every method with every form and keep rate.

    Attributes:
        settings: all of them, in the order in which their pictures are made.
        unmerged: the picture without merging; None before it is there.
        pictures: by setting, as far as they are there.
        refused: why a setting has no picture.
    """

    def __init__(
        self, methods: Sequence[str], forms: Sequence[str], keep_rates: Sequence[str]
    ) -> None:
        """Compare nothing yet.

        Raises:
            ValueError: there is no method, form or keep rate.
        """
        if not (methods and forms and keep_rates):
            raise ValueError("choose at least one method, one form and one keep rate.")
        self._methods = methods
        self._columns = list(product(forms, keep_rates))
        self.settings = [Setting(method, *column) for method in methods for column in self._columns]
        self.unmerged: Picture | None = None
        self.pictures: dict[Setting, MergedPicture] = {}
        self.refused: dict[Setting, str] = {}

    def run(
        self,
        studio: Studio,
        prompt: str,
        *,
        picture: Mapping[str, Any],
        merging: Mapping[str, Any],
        follow: Callable[[str], OnStep],
    ) -> Iterator[None]:
        """Generate all pictures, and yield after each.

        Args:
            studio: generates them.
            prompt: the prompt.
            picture: fields of `GenerateOptions`.
            merging: the other fields of `MergeConfig`.
            follow: makes the follower of a generation from its title.

        Raises:
            TypeError: a field of `picture` is of the wrong type.
            ValueError: a field of `picture` is out of range.
            NotANumberError: a picture has NaN pixels.
        """
        unmerged = studio.settings(**picture)
        self.unmerged = studio.unmerged(prompt, unmerged, follow("Unmerged picture"))
        yield
        for index, setting in enumerate(self.settings):
            try:
                config = MergeConfig(**{**merging, **setting._asdict()})
                settings = studio.settings(config, **picture)
            except (TypeError, ValueError) as error:
                self.refused[setting] = describe_error(error)
                continue
            title = f"Picture {index + 1} of {len(self.settings)}: {', '.join(setting)}"
            self.pictures[setting] = studio.merged(prompt, settings, follow(title))
            yield

    def sheet(self) -> Image.Image:
        """The pictures by method (down) and by form and keep rate (across), unmerged first."""
        unmerged = None if self.unmerged is None else self.unmerged.image
        cells = [
            [unmerged, *(self._image(Setting(method, *column)) for column in self._columns)]
            for method in self._methods
        ]
        columns = ["unmerged", *(f"{form}, {rate}" for form, rate in self._columns)]
        grid = PictureGrid(heading="", rows=self._methods, columns=columns, cells=cells)
        return contact_sheet([grid], cell=_CELL)

    def _image(self, setting: Setting) -> Image.Image | None:
        picture = self.pictures.get(setting)
        return None if picture is None else picture.image

    def table(self) -> list[list[str]]:
        """The measurements as text: a header, and a line for each picture."""
        if self.unmerged is None:
            return []
        pictures = self.pictures.items()
        return [
            ["method", "merge", "keep rate", *MEASUREMENTS],
            ["unmerged", "", "", *measurements(self.unmerged, self.unmerged)],
            *([*setting, *measurements(picture, self.unmerged)] for setting, picture in pictures),
        ]


MEASUREMENTS = ("PSNR to unmerged (dB)", "seconds", "attention products")
"""Titles of what `measurements` returns."""


def measurements(picture: Picture, unmerged: Picture) -> list[str]:
    """PSNR, time and share of products of a picture as text; its own PSNR is left out."""
    if not isinstance(picture, MergedPicture):
        return [number(None), number(picture.seconds), "100 %"]
    return [
        number(psnr(picture.image, unmerged.image), 1),
        number(picture.seconds),
        f"{100 * picture.product_share:.3g} %",
    ]
