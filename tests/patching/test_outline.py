from __future__ import annotations

import json
import shutil
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_tokenmerge import Grid, Linear, MergeConfig, network_size
from sd_tokenmerge.patching.apply import apply_patch
from sd_tokenmerge.patching.outline import load_outline, plan_sites
from tests.stored_json import JSON, MANY, places, replaced
from tests.tiny_models import tiny_sd15, tiny_sdxl, unet_inputs
from tests.tiny_transformers import FAMILIES, HEIGHT, WIDTH, call_transformer, tiny_transformer


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_sd15().save_pretrained(folder)
    return folder


PUBLISHED = {
    "stable-diffusion-v1-5": ((512, 512), 16, 5, Grid(64, 64)),
    "stable-diffusion-2-1": ((768, 768), 16, 5, Grid(96, 96)),
    "stable-diffusion-xl-base-1.0": ((1024, 1024), 70, 10, Grid(64, 64)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_models_need_no_weights(shared, name):
    size, num_sites, num_merged, grid = PUBLISHED[name]
    outline = load_outline(str(shared / "model-configs" / name))
    assert outline.native_size == size
    assert {parameter.device.type for parameter in outline.denoiser.parameters()} == {"meta"}
    sites = plan_sites(outline, MergeConfig())
    assert len(sites) == num_sites
    merged = [site for site in sites if site.merged]
    assert len(merged) == num_merged
    assert {site.grid for site in merged} == {grid}
    tokens = grid.num_tokens
    assert {(s.tokens_before, s.tokens_after) for s in merged} == {(tokens, tokens // 2)}
    rest = [site for site in sites if not site.merged]
    assert all(site.tokens_after == site.tokens_before for site in rest)


@pytest.mark.parametrize("size", [(128, 128), (96, 160), (104, 72)])
def test_the_plan_is_what_a_patched_unet_does(tiny_folder, size):
    outline = load_outline(str(tiny_folder))
    config = MergeConfig("random", keep_rate=0.3, levels=2)
    planned = plan_sites(outline, config, height=size[0], width=size[1])
    unet = tiny_sd15().unet
    with apply_patch(unet, config) as handle:
        unet(**unet_inputs(height=size[0] // 8, width=size[1] // 8))
        rows = handle.report().rows
    assert [site.block for site in planned] == [row.block for row in rows]
    for site, row in zip(planned, rows, strict=True):
        assert (site.level, site.merged) == (row.level, row.merged)
        if site.merged:
            assert (site.grid, site.tokens_before, site.tokens_after) == (
                row.grid,
                row.tokens_before,
                row.tokens_after,
            )


def test_sdxl_has_no_attention_at_its_finest_level(tmp_path):
    tiny_sdxl().save_pretrained(tmp_path)
    sites = plan_sites(load_outline(str(tmp_path)), MergeConfig())
    assert {site.level for site in sites if site.merged} == {1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "tome", "keep_rate": 0.4}, "a keep rate of at least 0.5"),
        ({"keep_rate": Linear(0.9, 0.5)}, "`keep_rate` must be the same in every step"),
        ({"keep_rate": 0.0}, r"`keep_rate` must be in \(0, 1\]"),
        ({"levels": 5}, r"`levels` must be in \[1, 4\]"),
        ({"height": 100}, "`height` must be a positive multiple of 8, got 100"),
        ({"width": -8}, "`width` must be a positive multiple of 8, got -8"),
        ({"method": "nothing"}, "`method` must be one of"),
    ],
)
def test_bad_arguments_are_refused(tiny_folder, arguments, message):
    outline = load_outline(str(tiny_folder))
    size = {name: value for name, value in arguments.items() if name in ("height", "width")}
    options = {name: value for name, value in arguments.items() if name not in size}
    with pytest.raises(ValueError, match=message):
        plan_sites(outline, MergeConfig(**options), **size)


def test_a_method_may_reach_one_size_and_not_another(tiny_folder):
    """2 x 2 cells of an odd grid: fewer destinations than a quarter of the tokens."""
    outline = load_outline(str(tiny_folder))
    sites = plan_sites(outline, MergeConfig("tome-sd", keep_rate=0.25))
    assert {site.tokens_after for site in sites if site.merged} == {64}
    with pytest.raises(ValueError, match="tome-sd on a 2x16 grid"):
        plan_sites(outline, MergeConfig("tome-sd", keep_rate=0.2), height=16, width=128)


def save_unet_config(folder, **config):
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text(json.dumps(config))


def test_an_unknown_block_type_is_refused_with_the_place_it_is_in(tmp_path):
    save_unet_config(tmp_path, down_block_types=["Nope"], up_block_types=["Nope"])
    message = (
        r"has a unet/config\.json that diffusers .* can't build a UNet2DConditionModel from: .*Nope"
    )
    with pytest.raises(ValueError, match=message):
        load_outline(str(tmp_path))


def test_a_denoiser_of_too_many_layers_is_not_built(tmp_path, monkeypatch):
    monkeypatch.setattr(network_size, "_MOST_TENSORS", 100)
    save_unet_config(tmp_path, layers_per_block=1_000_000)
    with pytest.raises(ValueError, match=r"can't build .* asks for more than 100 tensors"):
        load_outline(str(tmp_path))


@pytest.mark.parametrize("folder_of_autoencoder", [None, "movq"])
def test_unets_without_mergeable_attention_need_no_vae(tmp_path, folder_of_autoencoder):
    """DeepFloyd IF has no autoencoder, and Kandinsky 2.2 has one in a folder of another name."""
    save_unet_config(
        tmp_path,
        down_block_types=["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
        block_out_channels=[32, 64],
    )
    if folder_of_autoencoder is not None:
        (tmp_path / folder_of_autoencoder).mkdir()
    message = (
        "must have self-attention in a Transformer2DModel, .* got a UNet2DConditionModel with "
        "attention only in SimpleCrossAttnDownBlock2D, SimpleCrossAttnUpBlock2D, "
        "UNetMidBlock2DSimpleCrossAttn"
    )
    with pytest.raises(ValueError, match=message):
        load_outline(str(tmp_path))


def test_what_is_no_model_is_refused(tmp_path, tiny_folder):
    with pytest.raises(ValueError, match=r"a diffusers folder with a unet/config\.json"):
        load_outline(str(tmp_path))
    with pytest.raises(ValueError, match=r"a diffusers folder with a unet/config\.json"):
        load_outline(str(tmp_path / "missing" / "model"))
    with pytest.raises(ValueError, match="nobody/nothing"):
        load_outline("nobody/nothing", local_files_only=True)
    (tmp_path / "unet").mkdir()
    config = json.loads((tiny_folder / "unet" / "config.json").read_text())
    (tmp_path / "unet" / "config.json").write_text(
        json.dumps(config | {"_class_name": "FluxTransformer2DModel"})
    )
    with pytest.raises(ValueError, match="must have a UNet2DConditionModel, got a FluxTransf"):
        load_outline(str(tmp_path))


def save_transformer_config(folder, name, **changes):
    for part, config in (
        ("transformer", tiny_transformer(name).config | changes),
        (
            "vae",
            {"dim_mult": [1, 2, 4, 4]} if name == "qwen_image" else {"block_out_channels": [8] * 4},
        ),
    ):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))


VIDEO = {"cogvideox", "wan", "wan_of_images"}


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - VIDEO))
def test_transformers_are_planned_as_they_are_merged(tmp_path, name):
    transformer = tiny_transformer(name)
    save_transformer_config(tmp_path, name, _class_name=type(transformer).__name__)
    outline = load_outline(str(tmp_path))
    assert outline.pixels_per_token == 16
    assert outline.native_size == (None if name in ("flux", "flux2", "qwen_image") else (128, 128))
    config = MergeConfig("tome-sd", keep_rate=0.5)
    planned = plan_sites(outline, config, height=16 * HEIGHT, width=16 * WIDTH)
    with apply_patch(transformer, config) as handle:
        call_transformer(transformer, name)
        rows = handle.report().rows
    assert len(rows) >= 2
    assert [(site.block, site.level, site.grid, site.tokens_after) for site in planned] == [
        (row.block, row.level, row.grid, row.tokens_after) for row in rows
    ]


def test_transformers_refuse_sizes_that_are_no_whole_number_of_tokens(tmp_path):
    save_transformer_config(tmp_path, "flux", _class_name="FluxTransformer2DModel")
    outline = load_outline(str(tmp_path))
    with pytest.raises(ValueError, match="`height` must be a positive multiple of 16, got 24"):
        plan_sites(outline, MergeConfig(), height=24, width=32)
    with pytest.raises(ValueError, match="`height` must be given"):
        plan_sites(outline, MergeConfig())


@pytest.mark.parametrize("name", sorted(VIDEO))
def test_transformers_of_videos_are_refused(tmp_path, name):
    save_transformer_config(tmp_path, name, _class_name=type(tiny_transformer(name)).__name__)
    with pytest.raises(ValueError, match=r"`model` must make images, got a .*3DModel in "):
        load_outline(str(tmp_path))


@pytest.mark.parametrize("name", [None, "SanaTransformer2DModel", ["FluxTransformer2DModel"]])
def test_other_transformers_are_refused_by_name(tmp_path, name):
    save_transformer_config(tmp_path, "sd3", _class_name=name)
    with pytest.raises(ValueError, match=r"must have one of these transformers: AuraFlow.* got a "):
        load_outline(str(tmp_path))


@settings(MANY, max_examples=10)
@given(data=st.data())
@pytest.mark.parametrize("file", ["unet/config.json", "vae/config.json"])
def test_any_value_at_any_place_of_a_configuration(tmp_path, tiny_folder, file, data):
    for name in ("unet", "vae"):
        (tmp_path / name).mkdir(exist_ok=True)
        shutil.copy(tiny_folder / name / "config.json", tmp_path / name)
    values = json.loads((tiny_folder / file).read_text())
    # diffusers would build a million layers
    path = data.draw(st.sampled_from([p for p in places(values) if "layers_per_block" not in p]))
    (tmp_path / file).write_text(json.dumps(replaced(values, path, data.draw(JSON))))
    with suppress(ValueError):
        plan_sites(load_outline(str(tmp_path)), MergeConfig())
