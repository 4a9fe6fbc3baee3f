from __future__ import annotations

import sys
from contextlib import ExitStack
from functools import partial
from itertools import product
from typing import get_args

import pytest
import tomesd
import torch
from diffusers import (
    StableDiffusionPAGPipeline,
    StableDiffusionSAGPipeline,
    TextToVideoZeroPipeline,
)
from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from diffusers.models.attention_processor import (
    AttnProcessor,
    CustomDiffusionAttnProcessor,
    CustomDiffusionAttnProcessor2_0,
    FusedAttnProcessor2_0,
    PAGCFGIdentitySelfAttnProcessor2_0,
    SlicedAttnProcessor,
)
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sd_tokenmerge import METHODS, ToMeSD, apply_patch, clusters_to_keep, parse_method
from sd_tokenmerge.config import Merge
from sd_tokenmerge.methods.base import Grid
from sd_tokenmerge.patching.call import DenoiserCall
from sd_tokenmerge.patching.sites import find_sites
from tests.patching.spies import SpyMethod, traced
from tests.reference.merged_block import merged_attention, merged_block
from tests.tiny_models import call_unet, tiny_sd15, tiny_unet, unet_inputs

KINDS = ["sd15", "sd21", "sdxl"]
MERGES = {  # merge, sizes, first order
    "qkv": ("qkv", False, False),
    "qkv sized": ("qkv", True, False),
    "kv": ("kv", False, False),
    "kv sized": ("kv", True, False),
    "kv first order": ("kv", True, True),
    "q": ("q", False, False),
    "two-sided": ("two-sided", True, True),
    "two-sided zeroth order": ("two-sided", True, False),
}
in_every_form = pytest.mark.parametrize("form", MERGES.values(), ids=MERGES)
TEXT_TO_VIDEO = sys.modules[TextToVideoZeroPipeline.__module__]
OTHER_FORMS = [
    {"merge": "kv"},
    {"merge": "q"},
    {"merge": "two-sided"},
    {"proportional_attention": True},
]
UNFUSED = [AttnProcessor, partial(SlicedAttnProcessor, 2)]
CUSTOM_DIFFUSION = [
    partial(CustomDiffusionAttnProcessor, train_kv=False, train_q_out=False),
    partial(CustomDiffusionAttnProcessor2_0, train_kv=False, train_q_out=False),
]
OTHER_PROCESSORS = [
    CUSTOM_DIFFUSION[0],
    partial(TEXT_TO_VIDEO.CrossFrameAttnProcessor, batch_size=2),
    partial(TEXT_TO_VIDEO.CrossFrameAttnProcessor2_0, batch_size=2),
    PAGCFGIdentitySelfAttnProcessor2_0,
]
SEEDED = [name for name in METHODS if parse_method(name).uses_seed]


def options_of(form):
    return dict(zip(("merge", "proportional_attention", "first_order"), form, strict=True))


@pytest.mark.parametrize("size", [(16, 16), (15, 22)], ids=["square", "odd"])
@in_every_form
@pytest.mark.parametrize("kind", KINDS)
def test_block_equals_the_slow_twin(kind, form, size):
    unet = tiny_unet(kind)
    method, inputs = ToMeSD(), unet_inputs(kind, height=size[0], width=size[1])
    handle = apply_patch(unet, method, keep_rate=0.4, **options_of(form))
    rows = {row.block: row for row in handle.report().rows if row.merged}
    site = [site for site in find_sites(unet) if site.path in rows][-1]
    with torch.no_grad(), traced(site.block) as trace:
        unet(**inputs)
    handle.remove()
    row = next(row for row in handle.report().rows if row.block == site.path)
    assert row.grid.num_tokens == trace.inputs[0].shape[1]
    partition = method(trace.inputs[0], clusters_to_keep(row.grid.num_tokens, 0.4), grid=row.grid)
    with torch.no_grad():
        expected = merged_block(
            site.block,
            trace.inputs[0],
            inputs["encoder_hidden_states"],
            partition.labels,
            *form,
        )
    torch.testing.assert_close(trace.outputs[0].double(), expected, rtol=0, atol=1e-5)
    change = trace.outputs[0] - trace.inputs[0]
    assert change.abs().max() > 1e-2  # the block does something


@in_every_form
@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_every_form_equals_the_slow_twin(method, form, monkeypatch):
    unet, partitions = tiny_unet(), []
    if parse_method(method).has_representatives and form[2]:
        with pytest.raises(ValueError, match=r"`first_order` must be False .* kmedoids"):
            apply_patch(unet, method, **options_of(form))
        return
    apply_patch(unet, method, features="keys", **options_of(form))
    attention = find_sites(unet)[0].attention
    choose = attention._merged_block._choose

    def chosen(*arguments):
        partitions.append(choose(*arguments))
        return partitions[-1]

    monkeypatch.setattr(attention._merged_block, "_choose", chosen)
    stand_in_for_unet(attention)
    tokens = torch.randn(2, 256, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        got = attention(tokens)
    found = partitions[0].check()
    assert found.num_clusters == 128
    expected = merged_attention(
        attention, tokens, found.labels, *form, representatives=found.representatives
    )
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


LENGTHS = {  # of queries and keys in each call of the attention function, of 256 tokens
    "qkv": [(64, 64)],
    "kv": [(256, 64)],
    "q": [(64, 256)],
    "two-sided": [(256, 64), (64, 256), (64, 64)],
}


class AttentionLengths(TorchFunctionMode):
    """Numbers of queries and keys in each call of the attention function."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is functional.scaled_dot_product_attention:
            query, key, *_ = args
            self.found.append((query.shape[2], key.shape[2]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("merge", get_args(Merge))
def test_only_self_attention_sees_fewer_tokens(merge):
    unet = tiny_unet()
    apply_patch(unet, "grid", keep_rate=0.25, merge=merge)
    block = find_sites(unet)[0].block
    with (
        traced(block.attn2) as cross_attention,
        traced(block.ff) as feed_forward,
        AttentionLengths() as lengths,
    ):
        call_unet(unet)
    cross = lengths.found.index((256, 77))
    assert sorted(lengths.found[:cross]) == sorted(LENGTHS[merge])
    assert cross_attention.inputs[0].shape[1] == feed_forward.inputs[0].shape[1] == 256


@pytest.mark.parametrize("features", ["input", "keys"])
def test_merged_tokens_are_projected(features):
    unet, spy = tiny_unet(), SpyMethod()
    apply_patch(unet, spy, keep_rate=0.25, features=features)
    block = find_sites(unet)[0].block
    attention = block.attn1
    layers = (attention.to_q, attention.to_k, attention.to_v)
    with traced(block.norm1) as norm, ExitStack() as stack:
        traces = [stack.enter_context(traced(layer)) for layer in layers]
        call_unet(unet)
    partition = spy(spy.calls[0].tokens, 64, grid=spy.calls[0].grid)
    for trace in traces:
        torch.testing.assert_close(trace.inputs[-1], partition.merge(norm.outputs[0]))


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (18, 26)])
@pytest.mark.parametrize("keep_rate", [0.75, 0.5, 0.3])
@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_tome_sd_equals_tomesd(kind, keep_rate, size):
    unet = tiny_unet(kind)
    inputs = unet_inputs(kind, height=size[0], width=size[1])
    sample = inputs.pop("sample")
    with torch.no_grad():
        plain = unet(sample, **inputs).sample
        with apply_patch(unet, "tome-sd", keep_rate=keep_rate):
            ours = unet(sample, **inputs).sample
        tomesd.apply_patch(unet, ratio=1 - keep_rate, use_rand=False)
        theirs = unet(sample, **inputs).sample
        tomesd.remove_patch(unet)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - plain).abs().max() > 1e-3


@pytest.mark.parametrize("features", ["input", "keys"])
@pytest.mark.parametrize("kind", KINDS)
def test_method_sees_the_features(kind, features):
    unet, spy = tiny_unet(kind), SpyMethod()
    apply_patch(unet, spy, features=features)
    report = apply_patch(unet, spy, features=features, replace=True).report()
    path = next(row.block for row in report.rows if row.merged)
    block = unet.get_submodule(path)
    with torch.no_grad(), traced(block) as of_block, traced(block.norm1) as of_norm:
        unet(**unet_inputs(kind))
        keys = block.attn1.to_k(of_norm.outputs[0]).unflatten(-1, (block.attn1.heads, -1)).mean(-2)
    expected = of_block.inputs[0] if features == "input" else keys
    torch.testing.assert_close(spy.calls[0].tokens, expected, rtol=1e-5, atol=1e-6)
    assert not spy.calls[0].tokens.requires_grad


def test_method_sees_the_attention_that_tokens_receive():
    unet, spy = tiny_unet(), SpyMethod(scored=True)
    apply_patch(unet, spy)
    block = find_sites(unet)[0].block
    with torch.no_grad(), traced(block.norm1) as norm:
        unet(**unet_inputs())
        attention, tokens = block.attn1, norm.outputs[0]
        queries = attention.head_to_batch_dim(attention.to_q(tokens))
        keys = attention.head_to_batch_dim(attention.to_k(tokens))
        weights = attention.get_attention_scores(queries, keys)  # [B * heads, N, N]
    received = weights.unflatten(0, (-1, attention.heads)).mean((1, 2))
    torch.testing.assert_close(spy.calls[0].scores, received, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("merge", get_args(Merge))
@pytest.mark.parametrize("kind", KINDS)
def test_keep_rate_one_is_bit_identical(kind, merge):
    unet = tiny_unet(kind)
    before = call_unet(unet, kind)
    apply_patch(unet, keep_rate=1, merge=merge)
    assert torch.equal(call_unet(unet, kind), before)


@pytest.mark.parametrize("method", ["atc", "tome-sd:random=true", "random", "kmedoids"])
def test_images_do_not_depend_on_their_batch(method):
    unet = tiny_unet()
    apply_patch(unet, method)
    three, one = call_unet(unet, batch=3), call_unet(unet, batch=1)
    torch.testing.assert_close(three[:1], one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@in_every_form
def test_half_precision(dtype, form):
    options = {"keep_rate": 0.3, **options_of(form)}
    single, half = tiny_unet(), tiny_unet().to(dtype)
    apply_patch(single, "grid", **options)  # clusters that rounding can't change
    apply_patch(half, "grid", **options)
    expected, got = call_unet(single), call_unet(half, dtype=dtype)
    assert got.dtype == dtype
    tolerance = {torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("features", ["input", "keys"])
@in_every_form
def test_autocast(form, features):
    unet = tiny_unet()
    apply_patch(unet, "grid", keep_rate=0.3, features=features, **options_of(form))
    expected = call_unet(unet)
    with torch.autocast("cpu", torch.bfloat16):
        got = call_unet(unet)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.06)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_in_half_precision(method, dtype):
    unet = tiny_unet().to(dtype)
    handle = apply_patch(unet, method, keep_rate=0.5)
    assert call_unet(unet, dtype=dtype).isfinite().all()
    assert handle.report().rows[0].times_computed == 1


@pytest.mark.parametrize("size", [(16, 24), (24, 16), (15, 17), (9, 13), (33, 20)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_size_gives_the_grid_of_the_transformer(kind, size):
    unet, spy = tiny_unet(kind), SpyMethod()
    apply_patch(unet, spy, levels=2)
    output = call_unet(unet, kind, height=size[0], width=size[1])
    assert output.shape == (2, 4, *size)
    coarser = tuple(-(-side // 2) for side in size)
    coarsest = tuple(-(-side // 2) for side in coarser)
    expected = {coarser, coarsest} if kind == "sdxl" else {size, coarser}
    assert {call.grid for call in spy.calls} == {Grid(*sides) for sides in expected}
    for call in spy.calls:
        assert call.num_clusters == clusters_to_keep(call.grid.num_tokens, 0.5)


class TestRandomness:
    @pytest.mark.parametrize("method", ["tome-sd:random=true", "random"])
    def test_only_seed_block_and_timestep_matter(self, method):
        unet = tiny_unet()
        apply_patch(unet, method, seed=1)
        torch.manual_seed(0)
        first = call_unet(unet)
        state = torch.get_rng_state()
        call_unet(unet, timestep=100, height=24)
        torch.manual_seed(5)
        assert torch.equal(call_unet(unet), first)
        other = tiny_unet()
        apply_patch(other, method, seed=2)
        assert not torch.equal(call_unet(other), first)
        torch.manual_seed(0)
        call_unet(unet)
        assert torch.equal(torch.get_rng_state(), state)

    def test_seeds_differ_between_blocks_and_timesteps(self):
        unet, spy = tiny_unet(), SpyMethod(seeded=True)
        apply_patch(unet, spy)
        for timestep in (500, 500, 300):
            call_unet(unet, timestep=timestep)
        first, again, later = ([call.seed for call in spy.calls[i : i + 5]] for i in (0, 5, 10))
        assert first == again
        assert len({*first, *later}) == 10
        assert all(0 <= seed < 2**63 for seed in first)

    def test_seeds_are_the_same_everywhere(self):
        unet, spy = tiny_unet(), SpyMethod(seeded=True)
        apply_patch(unet, spy, seed=7)
        call_unet(unet)
        # A hash of the text "7 down_blocks....0 (500.0,)": no session-dependent hash.
        assert spy.calls[0].seed == 7912908178996648827

    def test_timestep_may_be_a_number_or_one_per_image(self):
        unet, spy = tiny_unet(), SpyMethod(seeded=True)
        apply_patch(unet, spy)
        for timestep in (500, torch.tensor([500, 500]), torch.tensor([500.0])):
            with torch.no_grad():
                unet(**{**unet_inputs(), "timestep": timestep})
        assert len({call.seed for call in spy.calls}) == 5


def stand_in_for_unet(attention):
    """Let an attention believe that its transformer and its denoiser are running it."""
    block = attention._merged_block
    block.recorder.grid = Grid(16, 16)
    block.reuse.begin_call(DenoiserCall())


class TestRefusals:
    def test_tokens_must_fill_the_grid(self):
        unet = tiny_unet()
        apply_patch(unet, "tome-sd")
        block = find_sites(unet)[0].block
        stand_in_for_unet(block.attn1)
        with pytest.raises(ValueError, match=r"must fill its transformer's 16x16 grid, got 255"):
            block(torch.randn(2, 255, 32), encoder_hidden_states=torch.randn(2, 77, 32))

    def test_block_needs_its_transformer(self):
        unet = tiny_unet()
        apply_patch(unet, "tome-sd")
        call_unet(unet)
        with pytest.raises(RuntimeError, match="must be run by its transformer"):
            find_sites(unet)[0].block(torch.randn(2, 256, 32))

    def test_attention_needs_its_block(self):
        unet = tiny_unet()
        apply_patch(unet, "tome-sd")
        stand_in_for_unet(find_sites(unet)[0].attention)
        with pytest.raises(RuntimeError, match="must run its self-attention itself"):
            find_sites(unet)[0].attention(torch.randn(2, 256, 32))

    def test_self_attention_masks(self):
        unet = tiny_unet()
        apply_patch(unet, "tome-sd")
        mask = torch.ones(2, 256)
        with pytest.raises(ValueError, match="must get neither"):
            find_sites(unet)[0].transformer(
                torch.randn(2, 32, 16, 16), torch.randn(2, 77, 32), attention_mask=mask
            )

    def test_other_keys(self):
        unet = tiny_unet()
        apply_patch(unet, "tome-sd", features="keys")
        stand_in_for_unet(find_sites(unet)[0].attention)
        with pytest.raises(ValueError, match="must get neither"):
            find_sites(unet)[0].attention(torch.randn(2, 256, 32), torch.randn(2, 9, 32))

    @pytest.mark.parametrize("first", ["patch", "cache"])
    def test_caches_inside_the_attention(self, first):
        unet = tiny_unet()
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_block_identifiers=("down_blocks.0.attentions.0",),
            current_timestep_callback=lambda: 500,
        )
        if first == "patch":
            apply_patch(unet, "tome-sd")
            apply_pyramid_attention_broadcast(unet, config)
            with pytest.raises(RuntimeError, match="'pyramid_attention_broadcast'"):
                call_unet(unet)
        else:
            apply_pyramid_attention_broadcast(unet, config)
            with pytest.raises(RuntimeError, match="'pyramid_attention_broadcast'"):
                apply_patch(unet, "tome-sd")

    @pytest.mark.parametrize("first", ["patch", "processor"])
    @pytest.mark.parametrize(
        ("make", "options"),
        [
            *product(OTHER_PROCESSORS, OTHER_FORMS),
            *product(UNFUSED, OTHER_FORMS[:3]),
        ],
        ids=str,
    )
    def test_processors_that_misread_a_form(self, make, options, first):
        unet = tiny_unet()
        message = "works with the processor " + type(make()).__name__
        if first == "patch":
            apply_patch(unet, "tome-sd", **options)
            find_sites(unet)[0].attention.processor = make()
            with pytest.raises(RuntimeError, match=message):
                call_unet(unet)
        else:
            find_sites(unet)[0].attention.processor = make()
            with pytest.raises(RuntimeError, match=message):
                apply_patch(unet, "tome-sd", **options)

    def test_a_refusal_is_true_if_every_other_form_works(self):
        unet = tiny_unet()
        find_sites(unet)[0].attention.processor = CUSTOM_DIFFUSION[1]()
        with pytest.raises(RuntimeError, match="merge='qkv' with proportional attention does not"):
            apply_patch(unet, "tome-sd", proportional_attention=True)
        for options in OTHER_FORMS[:3]:
            apply_patch(unet, "tome-sd", **options).remove()

    def test_a_replaced_attention_function(self, monkeypatch):
        unet, attention = tiny_unet(), functional.scaled_dot_product_attention
        apply_patch(unet, "tome-sd", merge="kv")

        @torch.overrides.wrap_torch_function(lambda *_, **__: ())
        def replacement(*arguments, **options):
            with torch._C.DisableTorchFunction():
                return attention(*arguments, **options)

        monkeypatch.setattr(functional, "scaled_dot_product_attention", replacement)
        with pytest.raises(RuntimeError, match="called it 0 times"):
            call_unet(unet)

    @pytest.mark.parametrize(
        "make", [*CUSTOM_DIFFUSION, AttnProcessor, partial(SlicedAttnProcessor, 2)]
    )
    def test_the_plain_form_works_with_any_processor(self, make):
        self.require_same_output(make, {})

    @pytest.mark.parametrize("merge", get_args(Merge))
    @pytest.mark.parametrize("make", [FusedAttnProcessor2_0, CUSTOM_DIFFUSION[1]])
    def test_processors_that_take_every_form(self, make, merge):
        self.require_same_output(make, {"merge": merge})

    def require_same_output(self, make, options):
        unet, plain = tiny_unet(), tiny_unet()
        for site in find_sites(unet):
            site.attention.fuse_projections()  # for FusedAttnProcessor2_0
            site.attention.processor = make()
        apply_patch(unet, "tome-sd", **options)
        apply_patch(plain, "tome-sd", **options)
        torch.testing.assert_close(call_unet(unet), call_unet(plain), rtol=0, atol=1e-5)

    def test_self_attention_guidance(self):
        pipe = StableDiffusionSAGPipeline(**tiny_sd15().components, requires_safety_checker=False)
        options = {"num_inference_steps": 2, "output_type": "latent"}
        apply_patch(pipe, "tome-sd")
        assert pipe("a dog", **options).images.isfinite().all()  # its map is the middle block's
        with pytest.raises(RuntimeError, match="self-attention guidance needs"):
            apply_patch(pipe, "random", levels=4, replace=True)
        apply_patch(pipe.unet, "random", levels=4, replace=True)
        with pytest.raises(RuntimeError, match="self-attention guidance needs"):
            pipe("a dog", **options)

    @pytest.mark.parametrize("options", OTHER_FORMS, ids=str)
    def test_perturbed_attention_guidance(self, options):
        """The pipeline installs its processors when it is called, in the layers that it names."""
        pipe = StableDiffusionPAGPipeline(
            **tiny_sd15().components, requires_safety_checker=False, pag_applied_layers=["mid"]
        )
        apply_patch(pipe, "tome-sd", **options).remove()
        pipe.set_pag_applied_layers(["down_blocks.0"])
        message = "the processor PAG.*, which this pipeline installs when it is called"
        with pytest.raises(RuntimeError, match=message):
            apply_patch(pipe, "tome-sd", **options)
        apply_patch(pipe.unet, "tome-sd", **options)
        with pytest.raises(RuntimeError, match="works with the processor PAG"):
            pipe("a dog", num_inference_steps=2, output_type="latent")

    def test_keep_rate_out_of_reach_where_the_size_is_known_only_now(self):
        unet = tiny_unet()
        unet.register_to_config(sample_size=None)
        apply_patch(unet, "tome", keep_rate=0.4)
        with pytest.raises(
            ValueError, match=r"16x16 grid \(a keep rate of at least 0.5\), got 103"
        ):
            call_unet(unet)


def test_slow_twin_without_merging_is_plain_attention():
    attention = find_sites(tiny_unet())[0].attention
    tokens = torch.randn(2, 12, 32, dtype=torch.float64)
    labels = torch.arange(12).expand(2, 12)
    for form in MERGES.values():
        torch.testing.assert_close(
            merged_attention(attention, tokens, labels, *form),
            attention.double()(tokens),
        )
