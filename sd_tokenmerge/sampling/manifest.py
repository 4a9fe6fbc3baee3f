"""The manifest: one JSON line per finished image.

One process alone writes `manifest.jsonl`. Shards and further processes write `manifest.<who>.jsonl`
beside it, so that no two ever append to the same file; a run that has the folder for itself puts
them together. Readers take all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sd_tokenmerge.files import file_sha256, write_atomically
from sd_tokenmerge.sampling.plan import ImageJob

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class ImageRecord:
    """One finished image.

    Attributes:
        file: its name in the run folder.
        class_index: of the class, or of the prompt in its file.
        image_index: within its class.
        seed: what its noise was drawn from.
        prompt: what it shows.
        sha256: of the file.
        seconds: wall time of its batch, divided by the images in it.
        flagged: whether the safety checker blacked it out.
    """

    file: str
    class_index: int
    image_index: int
    seed: int
    prompt: str
    sha256: str
    seconds: float
    flagged: bool = False

    @property
    def job(self) -> ImageJob:
        """What was to be made."""
        return ImageJob(self.class_index, self.image_index, self.seed, self.prompt)

    def to_line(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


@dataclass(frozen=True)
class ManifestContent:
    """What manifests say.

    Attributes:
        records: in the order of the files; a file may be recorded more than once.
        damaged_lines: lines that are no record, as "file, line n".
        unfinished_lines: last lines without an end: being written, or their process died.
    """

    records: list[ImageRecord]
    damaged_lines: list[str]
    unfinished_lines: list[str]


def manifest_files(folder: Path) -> list[Path]:
    """All manifests in a run folder, the main one first."""
    return sorted(folder.glob("manifest*.jsonl"), key=lambda path: (path.name != MANIFEST, path))


def part_name(shard: int, shards: int, rank: int) -> str:
    """The manifest that one process of one shard writes."""
    parts = ["manifest"]
    if shards > 1:
        parts.append(f"shard-{shard + 1}-of-{shards}")
    if rank:
        parts.append(f"process-{rank}")
    return ".".join([*parts, "jsonl"])


def part_files(folder: Path, shard: int, shards: int) -> list[Path]:
    """The manifests that belong to one shard; a whole run owns all there are."""
    if shards == 1:
        return manifest_files(folder)
    base = part_name(shard, shards, 0).removesuffix("jsonl")
    return [path for path in manifest_files(folder) if path.name.startswith(base)]


def unite_manifests(
    folder: Path, shard: int = 0, shards: int = 1, records: Iterable[ImageRecord] | None = None
) -> None:
    """Put a shard's manifests, or all of a whole run's, into one; the folder must be locked.

    Args:
        folder: the run folder.
        shard: which shard, from 0.
        shards: how many.
        records: what to write instead of what the manifests say.
    """
    parts = part_files(folder, shard, shards)
    if records is None:
        records = {record.file: record for record in load_manifest(parts).records}.values()
    main = folder / part_name(shard, shards, 0)
    write_manifest(main, records)
    for path in parts:
        if path != main:
            path.unlink()


def load_manifest(files: Iterable[Path]) -> ManifestContent:
    """Read manifests as they are, damage included.

    Raises:
        OSError: one cannot be read.
    """
    content = ManifestContent([], [], [])
    for path in files:
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            is_last = number == len(lines)
            place = f"{path.name}, line {number}"
            if is_last and line:
                content.unfinished_lines.append(place)
            elif not is_last:
                record = _parse(line)
                if record is None:
                    content.damaged_lines.append(place)
                else:
                    content.records.append(record)
    return content


def read_manifest(folder: str | Path) -> list[ImageRecord]:
    """The finished images of a run folder, by class and image.

    A line that is still being written is left out. The images themselves are not read; see
    `has_content` and `sd-tokenmerge status`.

    Raises:
        ValueError: there is no manifest, or a line in it is no record.
        OSError: it cannot be read.
    """
    files = manifest_files(Path(folder))
    if not files:
        raise ValueError(f"`folder` must hold a {MANIFEST}, got {str(folder)!r} without one.")
    content = load_manifest(files)
    if content.damaged_lines:
        raise ValueError(
            f"{folder}: {content.damaged_lines[0]} is no record of an image; "
            f"start the same generation again to repair the folder."
        )
    unique = {record.file: record for record in content.records}
    return sorted(unique.values(), key=_order)


def write_manifest(path: Path, records: Iterable[ImageRecord]) -> None:
    """Replace a manifest by these records, by class and image."""
    lines = [record.to_line() + "\n" for record in sorted(records, key=_order)]
    write_atomically(path, "".join(lines).encode())


def has_content(path: Path, sha256: str) -> bool:
    """Whether a file is there and has this hash."""
    try:
        return file_sha256(path) == sha256
    except FileNotFoundError:
        return False


def intact_records(folder: Path, records: Iterable[ImageRecord]) -> dict[str, ImageRecord]:
    """Those records whose images are there with the recorded hash, by file name."""
    candidates = list(records)
    with ThreadPoolExecutor(max_workers=8) as pool:
        intact = pool.map(lambda r: has_content(folder / r.file, r.sha256), candidates)
        pairs = zip(candidates, intact, strict=True)
        return {record.file: record for record, is_intact in pairs if is_intact}


def _parse(line: bytes) -> ImageRecord | None:
    try:
        values: Any = json.loads(line)
        record = ImageRecord(**values)
    except (ValueError, TypeError):
        return None
    kinds: dict[Any, type] = {"str": str, "int": int, "float": float, "bool": bool}
    correct = all(
        isinstance(getattr(record, entry.name), kinds[entry.type]) for entry in fields(record)
    )
    return record if correct else None


def _order(record: ImageRecord) -> tuple[int, int]:
    return record.class_index, record.image_index
