"""The manifest: one JSON line per finished image.

A single process writes `manifest.jsonl`. Shards and further processes write `manifest.<part>.jsonl`
beside it, so that no two processes append to the same file; a run that has the folder to itself
unites them. Readers read all of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from stat import S_ISREG

from sd_tokenmerge.files import file_sha256, parse_json, read_regular_file, write_atomically
from sd_tokenmerge.sampling.plan import ImageJob

MANIFEST = "manifest.jsonl"

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ImageRecord:
    """One finished image.

    Attributes:
        file: its name in the run folder, `{class}_{i}.png`.
        class_index: of the class, or of the prompt in its file.
        image_index: within its class.
        seed: seed of its initial noise.
        prompt: its prompt.
        sha256: of the file.
        bytes: size of the file.
        modified_ns: the file's modification time when it was written, in nanoseconds.
        seconds: wall time of its batch divided by the images in the batch.
        flagged: whether the safety checker blacked it out.
    """

    file: str
    class_index: int
    image_index: int
    seed: int
    prompt: str
    sha256: str
    bytes: int
    modified_ns: int
    seconds: float
    flagged: bool = False

    def __post_init__(self) -> None:
        """Check what was read from a file.

        Raises:
            TypeError: a value is of the wrong type.
            ValueError: the numbers, the name or the hash cannot be those of an image.
        """
        types: dict[object, type] = {"str": str, "int": int, "float": float, "bool": bool}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if type(value) is not types[entry.type]:
                raise TypeError(f"`{entry.name}` must be of type {entry.type}, got {value!r}.")
        numbers = (self.class_index, self.image_index, self.seed, self.bytes, self.seconds)
        if min(numbers) < 0 or self.file != self.job.file or not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"not a record of an image: {self}.")

    @property
    def job(self) -> ImageJob:
        """The planned image."""
        return ImageJob(self.class_index, self.image_index, self.seed, self.prompt)

    def to_line(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


@dataclass(frozen=True)
class ManifestContent:
    """The content of one or several manifests.

    Attributes:
        records: in the order of the lines.
        damaged_lines: complete lines that are not records, as "file, line n".
        unfinished_lines: last lines without a newline: being written, or their process died.
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
    """The manifests of one shard; all manifests for a run that is not divided."""
    if shards == 1:
        return manifest_files(folder)
    base = part_name(shard, shards, 0).removesuffix("jsonl")
    return [path for path in manifest_files(folder) if path.name.startswith(base)]


def unite_manifests(
    folder: Path, shard: int = 0, shards: int = 1, records: Iterable[ImageRecord] | None = None
) -> None:
    """Unite the manifests of a shard, or of a whole run; the caller must hold the folder's lock.

    Args:
        folder: the run folder.
        shard: number of the shard, from 0.
        shards: how many shards there are.
        records: written instead of the manifests' own records.
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
    """Read manifests, damaged ones included.

    Raises:
        OSError: one cannot be read or is not a regular file.
    """
    content = ManifestContent([], [], [])
    for path in files:
        *lines, rest = read_regular_file(path).split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                content.records.append(ImageRecord(**parse_json(line, path.name)))
            except (TypeError, ValueError):
                content.damaged_lines.append(f"{path.name}, line {number}")
        if rest:
            content.unfinished_lines.append(f"{path.name}, line {len(lines) + 1}")
    return content


def read_manifest(folder: str | Path) -> list[ImageRecord]:
    """The finished images of a run folder, by class and image.

    A line that is still being written is left out. The images themselves are not read; see
    `is_intact` and `sd-tokenmerge status`.

    Raises:
        ValueError: there is no manifest, or a line in it is not a record.
        OSError: it cannot be read.
    """
    files = manifest_files(Path(folder))
    if not files:
        raise ValueError(f"`folder` must hold a {MANIFEST}, got {str(folder)!r} without one.")
    content = load_manifest(files)
    if content.damaged_lines:
        raise ValueError(
            f"{folder}: {content.damaged_lines[0]} is not a record of an image; "
            f"start the same generation again to repair the folder."
        )
    unique = {record.file: record for record in content.records}
    return sorted(unique.values(), key=_order)


def write_manifest(path: Path, records: Iterable[ImageRecord]) -> None:
    """Replace a manifest by these records, in order of class and image."""
    lines = [record.to_line() + "\n" for record in sorted(records, key=_order)]
    write_atomically(path, "".join(lines).encode())


def intact_records(
    folder: Path, records: Iterable[ImageRecord], *, hash_all: bool
) -> dict[str, ImageRecord]:
    """The records of the intact images, by file name.

    Args:
        folder: the run folder.
        records: those to check.
        hash_all: read and hash every image. Otherwise, an image that has its recorded size and
            modification time counts as unchanged; only the others are hashed.

    Returns:
        Records with their files' present modification times.
    """

    def check(record: ImageRecord) -> ImageRecord | None:
        path = folder / record.file
        try:
            status = path.stat()
            if not S_ISREG(status.st_mode) or status.st_size != record.bytes:
                return None
            is_unchanged = not hash_all and status.st_mtime_ns == record.modified_ns
            if not is_unchanged and file_sha256(path) != record.sha256:
                return None
        except FileNotFoundError:
            return None
        return replace(record, modified_ns=status.st_mtime_ns)

    with ThreadPoolExecutor(max_workers=8) as pool:
        return {record.file: record for record in pool.map(check, records) if record is not None}


def _order(record: ImageRecord) -> tuple[int, int]:
    return record.class_index, record.image_index
