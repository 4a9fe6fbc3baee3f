from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from sd_tokenmerge import PRESETS, Preset, apply_patch
from tests.tiny_models import call_unet, tiny_unet

OPTIONS = [field.name for field in fields(Preset) if field.name != "summary"]


def options_of(preset):
    return {name: getattr(preset, name) for name in OPTIONS}


@pytest.mark.parametrize("name", PRESETS)
def test_is_the_same_as_its_options_spelled_out(name):
    by_name, spelled_out = tiny_unet(), tiny_unet()
    first = apply_patch(by_name, preset=name)
    second = apply_patch(spelled_out, **options_of(PRESETS[name]))
    assert first.report() == second.report()
    assert torch.equal(call_unet(by_name), call_unet(spelled_out))
    assert first.report() == second.report()


def test_the_default_is_the_papers_form():
    unet, paper = tiny_unet(), tiny_unet()
    apply_patch(unet)
    apply_patch(
        paper,
        "atc:linkage=average",
        keep_rate=0.5,
        levels=1,
        features="input",
        merge="qkv",
        refresh_every=1,
        share_layers=False,
        proportional_attention=False,
    )
    assert torch.equal(call_unet(unet), call_unet(paper))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_can_be_overridden(option):
    other = {
        "method": "random",
        "keep_rate": 0.4,
        "features": "input",
        "merge": "qkv",
        "refresh_every": 3,
        "share_layers": True,
        "proportional_attention": False,
    }
    handle = apply_patch(tiny_unet(), preset="fast", **{option: other[option]})
    expected = apply_patch(
        tiny_unet(), **{**options_of(PRESETS["fast"]), option: other[option]}
    ).report()
    assert handle.report() == expected
    assert expected != apply_patch(tiny_unet(), preset="fast").report()


def test_every_option_is_an_argument():
    assert set(OPTIONS) <= set(inspect.signature(apply_patch).parameters)


@pytest.mark.parametrize("name", ["slow", "", None, 5])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="`preset` must be one of exact, balanced, fast, got"):
        apply_patch(tiny_unet(), preset=name)


def test_presets_can_not_be_changed():
    with pytest.raises(TypeError):
        PRESETS["mine"] = Preset("")
    with pytest.raises(FrozenInstanceError):
        PRESETS["fast"].keep_rate = 1.0
