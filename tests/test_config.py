from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

from sd_tokenmerge import PRESETS, Depth, Linear, MergeConfig, apply_patch
from sd_tokenmerge.config import make_config
from tests.tiny_models import call_unet, tiny_unet

OTHER_VALUES = {
    "method": "random",
    "keep_rate": 0.4,
    "levels": 2,
    "merge": "qkv",
    "features": "keys",
    "refresh_every": 4,
    "share_layers": True,
    "proportional_attention": False,
    "first_order": False,
    "seed": 5,
}


def test_every_option_has_one_help_sentence():
    for entry in fields(MergeConfig):
        assert entry.metadata["help"].endswith((".", ")."))
        assert f"{entry.name}:" in MergeConfig.__doc__


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_same_as_its_options_spelled_out(name):
    by_name, spelled_out, whole = tiny_unet(), tiny_unet(), tiny_unet()
    options = {entry.name: getattr(PRESETS[name], entry.name) for entry in fields(MergeConfig)}
    handles = [
        apply_patch(by_name, preset=name),
        apply_patch(spelled_out, **options),
        apply_patch(whole, PRESETS[name]),
    ]
    pictures = [call_unet(unet) for unet in (by_name, spelled_out, whole)]
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)
    assert all(handle.report() == handles[0].report() for handle in handles)


def test_the_default_is_the_papers_form():
    assert MergeConfig() == PRESETS["paper"] == make_config()
    unet, paper = tiny_unet(), tiny_unet()
    apply_patch(unet)
    apply_patch(
        paper,
        "atc:linkage=average",
        keep_rate=0.5,
        levels=1,
        merge="qkv",
        features="input",
        refresh_every=1,
        share_layers=False,
        proportional_attention=False,
    )
    assert torch.equal(call_unet(unet), call_unet(paper))


@pytest.mark.parametrize("option", OTHER_VALUES)
def test_every_option_overrides_the_preset(option):
    # "kv" allows every option
    options = {"merge": "kv"} | {option: OTHER_VALUES[option]}
    config = make_config(preset="fast", **options)
    preset = replace(PRESETS["fast"], merge="kv")
    assert config == replace(preset, **options) != preset
    handle = apply_patch(tiny_unet(), preset="fast", **options)
    assert handle.report() == apply_patch(tiny_unet(), config).report()
    assert handle.report() != apply_patch(tiny_unet(), preset).report()


def test_every_option_is_tried():
    assert set(OTHER_VALUES) == {entry.name for entry in fields(MergeConfig)}


@pytest.mark.parametrize(
    ("merge", "given", "weights_keys"),
    [
        ("kv", None, True),
        ("qkv", None, False),
        ("q", None, False),
        ("kv", False, False),
        ("qkv", True, True),
    ],
)
def test_keys_are_weighted_by_default_only_if_queries_stay(merge, given, weights_keys):
    config = MergeConfig(merge=merge, proportional_attention=given)
    assert config.weights_keys == weights_keys


@pytest.mark.parametrize(
    "config",
    [
        *PRESETS.values(),
        MergeConfig("tome-sd:random=true", keep_rate="50%", seed=2**63 - 1),
        MergeConfig("lotm", keep_rate=Linear(1.0, 0.4), levels=2),
        MergeConfig(keep_rate={0: 0.5, 1: Depth(0.8)}, proportional_attention=True),
    ],
    ids=str,
)
def test_json_is_read_back(config):
    values = json.loads(json.dumps(config.to_json()))
    assert MergeConfig.from_json(values) == replace(config, method=str(config.parsed_method))
    assert MergeConfig.from_json(values).to_json() == values


def test_configs_that_do_the_same_are_resolved_to_the_same():
    short = MergeConfig("atc", keep_rate="50%", merge="kv")
    long = MergeConfig("atc:linkage=average", levels=1, merge="kv", proportional_attention=True)
    assert short != long
    assert short.resolved() == long.resolved() == long.resolved().resolved()
    by_level = MergeConfig(keep_rate={0: 0.5, 1: 0.4})
    assert by_level.resolved() == replace(by_level, proportional_attention=False, first_order=False)


def test_an_option_that_is_missing_in_json_has_its_default():
    values = MergeConfig("tome-sd", refresh_every=3).to_json()
    del values["share_layers"], values["seed"]
    assert MergeConfig.from_json(values) == MergeConfig("tome-sd", refresh_every=3)


def test_text_names_what_is_not_at_its_default():
    assert str(MergeConfig()) == "atc, keep rate 0.5"
    config = MergeConfig("tome-sd", keep_rate=Linear(1, 0.4), merge="kv", share_layers=True)
    assert str(config) == (
        "tome-sd, keep rate linear:first=1,last=0.4,stages=5, merge=kv, share_layers=true"
    )


@pytest.mark.parametrize("name", ["exact", "", 5])
def test_unknown_presets_are_refused(name):
    with pytest.raises(ValueError, match=f"`preset` must be one of {', '.join(PRESETS)}, got"):
        apply_patch(tiny_unet(), preset=name)


def test_a_config_is_the_only_option():
    with pytest.raises(TypeError, match="must be the only merging option"):
        apply_patch(tiny_unet(), MergeConfig(), keep_rate=0.4)
    with pytest.raises(TypeError, match="must be the only merging option"):
        apply_patch(tiny_unet(), MergeConfig(), preset="fast")


def test_configs_can_not_be_changed():
    with pytest.raises(TypeError):
        PRESETS["mine"] = MergeConfig()
    with pytest.raises(FrozenInstanceError):
        PRESETS["fast"].keep_rate = 1.0
