"""The cache of image changes: any content gives the same result, or is computed anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from sd_tokenmerge.fid.storage import write_arrays
from sd_tokenmerge.sweep.change import cached_change
from tests.stored_json import MANY


@pytest.fixture
def runs(finished) -> tuple[Path, Path]:
    folder = Path(finished.out) / "runs"
    return folder / "unmerged", folder / "tome-sd_keep-0.5"


@MANY
@given(data=st.data())
def test_any_bytes_in_the_cache(runs, tmp_path: Path, data: st.DataObject) -> None:
    first = cached_change(*runs, tmp_path)
    (entry,) = (tmp_path / "change").iterdir()
    content = bytearray(entry.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] ^= data.draw(st.integers(1, 255))
    entry.write_bytes(data.draw(st.sampled_from([bytes(content)]) | st.binary(max_size=200)))
    assert cached_change(*runs, tmp_path) == first
    entry.unlink()


ARRAYS = hypothesis_numpy.arrays(
    hypothesis_numpy.floating_dtypes() | hypothesis_numpy.unicode_string_dtypes(),
    hypothesis_numpy.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=2),
)


@MANY
@given(arrays=st.dictionaries(st.sampled_from(["psnr", "ssim"]), ARRAYS))
def test_any_arrays_in_the_cache(runs, tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    cached_change(*runs, tmp_path)
    (entry,) = (tmp_path / "change").iterdir()
    write_arrays(entry, arrays)
    for values in cached_change(*runs, tmp_path):
        assert len(values) == 2
        assert all(isinstance(value, float) for value in values)
        assert not np.isnan(values).any()
    entry.unlink()
