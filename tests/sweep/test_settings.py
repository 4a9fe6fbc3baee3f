from __future__ import annotations

from pathlib import Path

import pytest

from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.sampling.options import NO_METHOD, GenerateOptions
from sd_tokenmerge.sweep.options import PAPER_KEEP_RATES, PAPER_METHODS, SweepOptions
from sd_tokenmerge.sweep.settings import make_settings


def sweep(merging: dict | None = None, **changes) -> SweepOptions:
    merging = MergeConfig(**merging or {})
    return SweepOptions(out="o", generation=GenerateOptions(out="-", merging=merging), **changes)


def test_the_defaults_are_table_2():
    settings = make_settings(sweep())
    assert len(settings) == 1 + len(PAPER_METHODS) * len(PAPER_KEEP_RATES)
    assert [str(setting) for setting in settings[:3]] == [
        "unmerged",
        "tome-sd, 90 %",
        "tome-sd, 80 %",
    ]


def test_unmerged_comes_first_and_does_not_depend_on_how_is_merged():
    usual = make_settings(sweep(methods=("atc",)))
    special = make_settings(
        sweep({"levels": 2, "merge": "kv", "refresh_every": 5}, methods=("atc",))
    )
    assert usual[0].options == special[0].options
    assert usual[0].options.merging is None
    assert (usual[0].method, usual[0].is_baseline) == (NO_METHOD, True)
    expected = MergeConfig(keep_rate=0.9, levels=2, merge="kv", refresh_every=5)
    assert special[1].options.merging == expected


def test_every_setting_has_a_folder_of_its_own():
    methods = ("atc", "atc:linkage=single", "tome-sd:stride=4,random=true")
    settings = make_settings(sweep(methods=methods, keep_rates=(0.5, 0.125, 0.9)))
    folders = [setting.folder for setting in settings]
    assert len(set(folders)) == len(folders) == 10
    assert folders[:4] == [
        Path("o/runs", name) for name in ("unmerged", *(f"atc_keep-{k}" for k in (0.9, 0.5, 0.125)))
    ]
    assert Path("o/runs/tome-sd-stride=4,random=true_keep-0.5") in folders


def test_the_label_is_what_the_user_wrote_and_the_run_the_canonical_string():
    (_, setting) = make_settings(sweep(methods=("atc:linkage=average",), keep_rates=(0.5,)))
    assert setting.label == "atc:linkage=average"
    assert setting.method == "atc"
    assert setting.options.merging == MergeConfig("atc", 0.5)


def test_a_keep_rate_of_1_is_the_unmerged_pipeline():
    settings = make_settings(sweep(methods=("atc",), keep_rates=(1.0, 0.5)))
    assert [setting.keep_rate for setting in settings] == [1.0, 0.5]


def test_one_method_in_two_spellings_is_refused():
    with pytest.raises(ValueError, match="got 'atc' and 'atc:linkage=average'"):
        make_settings(sweep(methods=("atc", "atc:linkage=average")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ()}, "`methods` must hold at least one"),
        ({"methods": ("atc", "atc")}, "`methods` must hold each entry once"),
        ({"methods": ("none",)}, "`methods` must not hold 'none'"),
        ({"keep_rates": ()}, "`keep_rates` must hold at least one"),
        ({"keep_rates": (0.0,)}, r"`keep_rates` must be in \(0, 1\], got 0\.0"),
        ({"keep_rates": (1.5,)}, r"`keep_rates` must be in \(0, 1\], got 1\.5"),
        ({"sheet_images": 0}, "`sheet_images` must be at least 1"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        sweep(**changes)


def test_keep_rates_that_change_are_refused():
    with pytest.raises(TypeError, match=r"`keep_rates` must be numbers, got 'depth:rate=0\.7'"):
        sweep(keep_rates=(0.5, "depth:rate=0.7"))


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="`method` must be one of atc"):
        make_settings(sweep(methods=("atk",)))
