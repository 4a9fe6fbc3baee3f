"""Merged attention must not take more memory than unmerged attention, whatever the method."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.profiler import ProfilerActivity, profile

from sd_tokenmerge import apply_patch
from sd_tokenmerge.kernels import search
from sd_tokenmerge.methods import METHODS
from sd_tokenmerge.patching.call import DenoiserCall
from sd_tokenmerge.patching.patch import find_patch
from sd_tokenmerge.patching.sites import find_sites
from tests.tiny_models import UNET_CONFIGS

KV = {"merge": "kv"}
SIDE, CHANNELS = 64, 320
ALL_METHODS = [
    *METHODS,
    *("atc:linkage=single", "tome-sd:random=true", "lotm:neighbours=grid"),
    *("kmeans:weighted=true", "kmedoids:weighted=true", "kmedoids:medoid=public"),
]


@pytest.fixture(scope="module")
def unet():
    """As wide as SD 1.5 at the finest level."""
    config = {
        **UNET_CONFIGS["sd15"],
        "block_out_channels": [CHANNELS, 32],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(**config).eval()


def peak_of_attention(unet, batch, side=SIDE):
    """The most bytes allocated at a time from the norm before self-attention to the one after."""
    site = find_sites(unet)[0]
    image = torch.randn(batch, CHANNELS, side, side, generator=torch.Generator().manual_seed(0))
    patch = find_patch(unet)
    if patch is not None:
        patch._reuse.begin_call(DenoiserCall())
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    hooks = [
        site.block.norm1.register_forward_hook(lambda *_: profiler.start()),
        site.block.norm2.register_forward_pre_hook(lambda *_: profiler.stop()),
    ]
    with torch.no_grad():
        site.transformer(image, torch.randn(batch, 77, 32), return_dict=False)
    for hook in hooks:
        hook.remove()
    events = profiler.profiler.kineto_results.events()
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("options", [{}, {"features": "keys"}, KV], ids=str)
@pytest.mark.parametrize("method", ALL_METHODS)
def test_is_at_most_that_of_unmerged_attention(unet, method, options, batch):
    unmerged = peak_of_attention(unet, batch)
    assert unmerged >= 4 * batch * SIDE**2 * CHANNELS * 4  # queries, keys, values and output
    with apply_patch(unet, method, keep_rate=0.5, **options):
        assert peak_of_attention(unet, batch) <= unmerged


@pytest.mark.slow
@pytest.mark.parametrize("search_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"features": "keys"}], ids=str)
@pytest.mark.parametrize("keep_rate", [0.5, 0.1])
@pytest.mark.parametrize(("batch", "side"), [(1, 64), (2, 96), (1, 96)])
@pytest.mark.parametrize("linkage", ["single", "average"])
def test_of_linkages_at_any_size(
    unet, linkage, batch, side, keep_rate, options, search_dtype, monkeypatch
):
    monkeypatch.setattr(search, "search_dtype", lambda device: search_dtype)
    unmerged = peak_of_attention(unet, batch, side)
    with apply_patch(unet, f"atc:linkage={linkage}", keep_rate=keep_rate, **options):
        assert peak_of_attention(unet, batch, side) <= unmerged


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_of_complete_linkage_exceeds_it_by_one_matrix_at_most(unet, batch):
    unmerged = peak_of_attention(unet, batch)
    with apply_patch(unet, "atc:linkage=complete", keep_rate=0.5, features="keys"):
        assert peak_of_attention(unet, batch) <= unmerged + 4 * SIDE**4
