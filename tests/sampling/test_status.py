from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sd_tokenmerge.sampling.lock import lock_folder
from sd_tokenmerge.sampling.manifest import MANIFEST
from sd_tokenmerge.sampling.run import generate
from sd_tokenmerge.sampling.status import find_runs, run_status
from tests.sampling.conftest import MakeOptions


def test_status_counts_what_is_done_missing_and_broken(
    make_options: MakeOptions, tiny_pipe: Any
) -> None:
    options = make_options(keep_rate=0.6)
    folder = Path(options.out)
    generate(options, pipe=tiny_pipe)
    status = run_status(folder)
    assert (status.method, status.keep_rate, status.total) == ("tome-sd", "0.6", 6)
    assert (status.done, status.missing, status.broken, status.findings) == (6, 0, 0, ())
    assert status.is_complete
    assert not status.is_running

    (folder / "0_0.png").unlink()
    (folder / "0_1.png").write_bytes(b"")
    manifest = folder / MANIFEST
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:-1]) + '{"fi')
    status = run_status(folder)
    assert (status.done, status.missing, status.broken) == (3, 1, 2)
    assert status.findings == (
        "1 x recorded image that is not there: 0_0.png",
        "1 x image with another content than recorded: 0_1.png",
        "1 x image without a record: 2_1.png",
        "1 x manifest line that is not a record: manifest.jsonl, line 6",
    )
    assert not status.is_complete


def test_what_is_being_written_is_not_broken(make_options: MakeOptions, tiny_pipe: Any) -> None:
    options = make_options()
    folder = Path(options.out)
    generate(options, pipe=tiny_pipe)
    manifest = folder / MANIFEST
    manifest.write_text(manifest.read_text()[:-20])
    with lock_folder(folder):
        status = run_status(folder)
    assert status.is_running
    assert (status.done, status.missing, status.broken, status.findings) == (5, 1, 0, ())
    assert run_status(folder).broken == 1


def test_status_does_not_need_the_prompt_file(
    make_options: MakeOptions, tiny_pipe: Any, tmp_path: Path
) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a\nb\n")
    options = make_options(classes=None, prompts=str(path), images_per_class=1, method="none")
    generate(options, pipe=tiny_pipe)
    path.unlink()
    status = run_status(options.out)
    assert (status.done, status.total, status.keep_rate) == (2, 2, "1")


@pytest.mark.parametrize("changes", [{"speed": 3}, {"steps": 0}, {"classes": 7}])
def test_options_that_none_are_make_a_run_unusable(
    make_options: MakeOptions, tiny_pipe: Any, changes: dict[str, Any]
) -> None:
    options = make_options()
    generate(options, pipe=tiny_pipe)
    path = Path(options.out) / "run.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps(description | {"options": description["options"] | changes}))
    with pytest.raises(ValueError, match=r"run\.json is damaged \(.*Restore the file"):
        run_status(options.out)


def test_runs_are_found_below_a_folder(
    make_options: MakeOptions, tiny_pipe: Any, tmp_path: Path
) -> None:
    assert find_runs(tmp_path) == []
    with pytest.raises(ValueError, match=r"`folder` must hold a run\.json"):
        run_status(tmp_path)
    for name in ("b", "a/c"):
        generate(make_options(out=str(tmp_path / name), classes=(1,)), pipe=tiny_pipe)
    assert find_runs(tmp_path) == [tmp_path / "a" / "c", tmp_path / "b"]
    assert find_runs(tmp_path / "b") == [tmp_path / "b"]
