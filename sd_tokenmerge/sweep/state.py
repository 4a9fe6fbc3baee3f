"""`sweep.json`: what is planned, what was measured and written, and from which content."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sd_tokenmerge.files import write_atomically

RUNS = "runs"
"""Folder of the run folders."""
STATE_FILE = "sweep.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured on the images of one setting; fields as in `SweepRow`.

    Attributes:
        notes: what a reader of the numbers should know.
    """

    num_generated: int
    num_reference: int | None = None
    fid: float | None = None
    fid_se: float | None = None
    delta: float | None = None
    delta_se: float | None = None
    kid: float | None = None
    kid_se: float | None = None
    psnr_db: float | None = None
    psnr_db_low: float | None = None
    psnr_db_high: float | None = None
    ssim: float | None = None
    ssim_low: float | None = None
    ssim_high: float | None = None
    feature_distance: float | None = None
    notes: tuple[str, ...] = ()

    def numbers(self) -> dict[str, Any]:
        """All but the notes."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "notes"}


@dataclass(frozen=True)
class PlannedSetting:
    """One setting of a sweep, whether it was begun or not.

    Attributes:
        folder: its run folder, relative to the sweep's.
        method: its method string.
        keep_rate: its keep rate.
        images: how many there are to be.
    """

    folder: str
    method: str
    keep_rate: float
    images: int


@dataclass
class SweepState:
    """The content of `sweep.json`.

    Attributes:
        plan: all settings, the unmerged pipeline first.
        measurements: by run folder's name, `"key"` (hash of all content behind it) and `"values"`.
        results: `"key"` of the tables and plots, and the hash of each `"files"`.
    """

    plan: list[PlannedSetting] = field(default_factory=list)
    measurements: dict[str, dict[str, Any]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)

    def measurement(self, name: str, key: str) -> Measurement | None:
        """What was measured from exactly this content; None if nothing was."""
        entry = self.measurements.get(name)
        if entry is None or entry["key"] != key:
            return None
        values: dict[str, Any] = {
            name: math.inf if value == "inf" else value for name, value in entry["values"].items()
        }
        values["notes"] = tuple(values["notes"])
        return Measurement(**values)

    def record(self, name: str, key: str, measurement: Measurement) -> None:
        """Remember a measurement."""
        values = {k: "inf" if v == math.inf else v for k, v in asdict(measurement).items()}
        self.measurements[name] = {"key": key, "values": values}

    def write(self, folder: Path) -> None:
        """Write `sweep.json`."""
        document = {"format": FORMAT, **asdict(self)}
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(folder / STATE_FILE, text.encode())

    @classmethod
    def read(cls, folder: Path) -> SweepState:
        """Read `sweep.json`; a fresh state where there is none.

        Raises:
            ValueError: it is damaged or of another version.
        """
        path = folder / STATE_FILE
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        except ValueError as error:
            raise _unusable(path, f"is damaged (no JSON: {error})") from error
        if not isinstance(document, dict) or document.get("format", FORMAT) != FORMAT:
            raise _unusable(path, f"must be of format {FORMAT}, and is of another version")
        try:
            plan = [PlannedSetting(**setting) for setting in document["plan"]]
            return cls(plan, document["measurements"], document["results"])
        except (KeyError, TypeError) as error:
            raise _unusable(path, f"is damaged (no plan, measurements and results: {error})") from (
                error
            )


def _unusable(path: Path, problem: str) -> ValueError:
    return ValueError(
        f"{path} {problem}. To measure again, remove everything in that folder but {RUNS}/, which "
        f"holds the images; or restore the file from a copy."
    )


def content_key(content: object) -> str:
    """A hash over JSON values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
