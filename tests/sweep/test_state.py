from __future__ import annotations

import json
import math

import pytest

from sd_tokenmerge.sweep.state import Measurement, PlannedSetting, SweepState, content_key


def test_a_measurement_is_found_by_its_content_only(tmp_path):
    state = SweepState([PlannedSetting("runs/atc_keep-0.5", "atc", 0.5, 4)])
    measurement = Measurement(num_generated=4, fid=3.5, psnr_db=math.inf, notes=("a", "b"))
    state.record("atc_keep-0.5", "key", measurement)
    state.write(tmp_path)
    read = SweepState.read(tmp_path)
    assert read.plan == state.plan
    assert read.measurement("atc_keep-0.5", "key") == measurement
    assert read.measurement("atc_keep-0.5", "other") is None
    assert read.measurement("atc_keep-0.4", "key") is None


def test_the_file_is_valid_json_also_with_infinities(tmp_path):
    state = SweepState()
    state.record("x", "key", Measurement(num_generated=4, psnr_db=math.inf))
    state.write(tmp_path)
    text = (tmp_path / "sweep.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_no_file_is_a_fresh_state_and_another_format_an_error(tmp_path):
    assert SweepState.read(tmp_path) == SweepState()
    (tmp_path / "sweep.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="must be of format 1"):
        SweepState.read(tmp_path)


def test_the_key_depends_on_content_not_on_order_of_names():
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})
