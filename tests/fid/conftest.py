from __future__ import annotations

from pathlib import Path

import pytest

from tests.fid.pictures import fill


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("SD_TOKENMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def picture_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of twelve synthetic pictures."""
    return fill(tmp_path_factory.mktemp("pictures") / "set", 4, 12)
