"""Token merging together with whatever else is done to a UNet, in either order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import (
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPAGPipeline,
)
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
)
from packaging.version import Version
from peft import LoraConfig
from torch.utils.checkpoint import checkpoint

from sd_tokenmerge import Grid, Linear, apply_patch
from sd_tokenmerge.patching.sites import find_sites
from tests.patching.spies import traced
from tests.tiny_models import CROSS_ATTENTION_DIM, tiny_sd15, tiny_sdxl, tiny_unet, unet_inputs


@dataclass
class Change:
    """Something done to a UNet, how to undo it (None: it can't be), and what a call then needs."""

    name: str
    do: Callable[[Any], Any]
    undo: Callable[[Any], Any] | None = None
    inputs: dict[str, Any] = field(default_factory=dict)

    def __str__(self):
        return self.name


def use_plain_processors(unet):
    unet.set_attn_processor(AttnProcessor())


def use_first_processors(unet):
    unet.set_attn_processor(AttnProcessor2_0())  # set_default_attn_processor() gives plain ones


def load_ip_adapter(unet):
    generator = torch.Generator().manual_seed(3)

    def weight(*shape):
        return torch.randn(*shape, generator=generator) * 0.2

    width, adapter = CROSS_ATTENTION_DIM, {}
    cross_attentions = [name for name in unet.attn_processors if "attn2" in name]
    for index, name in enumerate(cross_attentions):
        channels = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        adapter[f"{2 * index + 1}.to_k_ip.weight"] = weight(channels, width)
        adapter[f"{2 * index + 1}.to_v_ip.weight"] = weight(channels, width)
    projection = {
        "proj.weight": weight(4 * width, 16),
        "proj.bias": weight(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": adapter}])


def unload_ip_adapter(unet):
    pipe = tiny_sd15()
    pipe.unet = unet
    pipe.unload_ip_adapter()


def add_lora(unet):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    unet.requires_grad_(False)


def delete_lora(unet):
    unet.delete_adapters("default")


def attention_modules(unet):
    return [site.attention for site in find_sites(unet)]


def add_attention_hooks(unet):
    for attention in attention_modules(unet):
        add_hook_to_module(attention, AlignDevicesHook(execution_device="cpu"))


def remove_attention_hooks(unet):
    for attention in attention_modules(unet):
        remove_hook_from_module(attention)


def add_denoiser_hook(unet):
    add_hook_to_module(unet, AlignDevicesHook(execution_device="cpu", io_same_device=True))


def group_offload(unet):
    if Version(diffusers.__version__) < Version("0.41") and not torch.accelerator.is_available():
        pytest.skip("diffusers before 0.41 offloads groups only beside an accelerator")
    apply_group_offloading(
        unet,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
    )


def cast_layerwise(unet):
    apply_layerwise_casting(unet, storage_dtype=torch.float16, compute_dtype=torch.float32)


def compute_in_slices(unet):
    for attention in attention_modules(unet):
        attention.set_attention_slice(2)


def chunk_feed_forward(unet):
    for site in find_sites(unet):
        site.block.set_chunk_feed_forward(4, dim=1)


CHANGES = [
    Change("plain processors", use_plain_processors, use_first_processors),
    Change("default processors", lambda u: u.set_default_attn_processor()),
    Change("slicing", lambda u: u.set_attention_slice("max"), use_first_processors),
    Change("slicing in attention", compute_in_slices),
    Change("fused QKV", lambda u: u.fuse_qkv_projections(), lambda u: u.unfuse_qkv_projections()),
    Change(
        "IP-Adapter",
        load_ip_adapter,
        unload_ip_adapter,
        {"added_cond_kwargs": {"image_embeds": [torch.linspace(-1, 1, 32).view(2, 1, 16)]}},
    ),
    Change("LoRA", add_lora, delete_lora),
    Change("LoRA at half scale", add_lora, None, {"cross_attention_kwargs": {"scale": 0.5}}),
    Change("sequential offload", lambda u: accelerate.cpu_offload(u, execution_device="cpu")),
    Change("model offload", add_denoiser_hook, remove_hook_from_module),
    Change("hooks on the attentions", add_attention_hooks, remove_attention_hooks),
    Change("group offload", group_offload),
    Change("layerwise casting", cast_layerwise),
    Change("chunked feed-forward", chunk_feed_forward),
    Change("FreeU", lambda u: u.enable_freeu(0.9, 0.2, 1.2, 1.4), lambda u: u.disable_freeu()),
    Change("channels last", lambda u: u.to(memory_format=torch.channels_last)),
]
UNFUSED = ["plain processors", "default processors", "slicing", "slicing in attention"]
"""Changes to processors that don't call scaled_dot_product_attention."""
PATCHES = [
    {"method": "tome-sd"},
    {"method": "tome-sd", "features": "keys", "merge": "two-sided"},
    pytest.param({"method": "tome-sd", "features": "keys", "merge": "kv"}, marks=pytest.mark.slow),
    pytest.param({"method": "kmeans:weighted=true", "merge": "q"}, marks=pytest.mark.slow),
]


@torch.no_grad()
def call(unet, change=None):
    return unet(**unet_inputs(), **(change.inputs if change else {})).sample


def merged_blocks(handle):
    return sum(row.times_computed > 0 for row in handle.report().rows)


@pytest.mark.parametrize("options", PATCHES, ids=str)
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_order_does_not_matter(change, options):
    if change.name in UNFUSED and options.get("merge", "qkv") != "qkv":
        pytest.skip("refused: tested in test_attention.py")
    first, second = tiny_unet(), tiny_unet()
    change.do(first)
    changed = call(first, change)

    handles = [apply_patch(first, **options), apply_patch(second, **options)]
    merged = call(second)
    change.do(second)
    outputs = [call(first, change), call(second, change)]
    assert torch.equal(*outputs)
    assert [merged_blocks(handle) for handle in handles] == [5, 5]
    assert not torch.allclose(outputs[0], changed, atol=1e-3)

    handles[0].remove()
    assert torch.equal(call(first, change), changed)
    if change.undo is not None:
        change.undo(second)
        assert torch.equal(call(second), merged)
    handles[1].remove()


@pytest.mark.parametrize("change", [c for c in CHANGES if c.undo], ids=str)
def test_undoing_a_change_made_before(change):
    unet, plain = tiny_unet(), tiny_unet()
    change.do(unet)
    handle = apply_patch(unet, "tome-sd")
    change.undo(unet)
    apply_patch(plain, "tome-sd")
    assert torch.equal(call(unet), call(plain))
    handle.remove()
    assert torch.equal(call(unet), call(tiny_unet()))


CHECKPOINTED = [
    {},
    {"features": "keys", "merge": "kv"},
    {"method": "tome-sd:random=true"},
    {"method": "random", "share_layers": True},
    {"refresh_every": 2, "merge": "kv"},
    {"keep_rate": Linear(0.9, 0.3, stages=2)},
]


class Owner:
    """The least that counts as a pipeline."""

    def __init__(self, unet):
        self.unet = unet
        self.scheduler = DDIMScheduler()
        self.scheduler.set_timesteps(3)


def gradients_of(options, sizes, *, checkpointing):
    """Gradients of one backward pass through several calls, as in DRaFT and AlignProp."""
    unet = tiny_unet().requires_grad_(True).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    owner = Owner(unet)
    apply_patch(owner, **{"method": "tome-sd", **options})
    loss = 0.0
    for timestep, (height, width) in zip(owner.scheduler.timesteps, sizes, strict=True):
        inputs = {**unet_inputs(height=height, width=width), "timestep": timestep}
        inputs["sample"] = inputs["sample"].roll(int(timestep), dims=-1)
        loss = loss + unet(**inputs).sample.square().sum()
    loss.backward()
    return {name: parameter.grad for name, parameter in unet.named_parameters()}


@pytest.mark.parametrize("options", CHECKPOINTED, ids=str)
@pytest.mark.parametrize("sizes", [[(16, 16)] * 3, [(16, 16), (16, 24), (24, 16)]], ids=str)
def test_gradient_checkpointing_gives_the_same_gradients(options, sizes):
    expected = gradients_of(options, sizes, checkpointing=False)
    assert all(gradient is not None for gradient in expected.values())
    for name, gradient in gradients_of(options, sizes, checkpointing=True).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("options", [{"method": "random"}, {"refresh_every": 2}], ids=str)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_that_hides_the_call_is_refused(options, use_reentrant):
    unet = tiny_unet().requires_grad_(True).train()
    apply_patch(unet, **{"method": "tome-sd", **options})
    inputs = {**unet_inputs(), "timestep": torch.tensor([500, 400])[0]}

    def call_unet(sample):
        return unet(**{**inputs, "sample": sample}).sample

    sample = inputs["sample"].requires_grad_(True)
    output = checkpoint(call_unet, sample, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="can't be recomputed during backward"):
        output.sum().backward()


def test_checkpointing_a_whole_unet_with_partitions_of_features_alone():
    gradients = []
    for checkpointing in (False, True):
        unet = tiny_unet().requires_grad_(True).train()
        apply_patch(unet, "tome-sd")
        loss = 0.0
        for size in (16, 24):
            inputs = unet_inputs(width=size)
            if checkpointing:
                sample = checkpoint(unet, *inputs.values(), use_reentrant=False).sample
            else:
                sample = unet(**inputs).sample
            loss = loss + sample.square().sum()
        loss.backward()
        gradients.append({name: p.grad for name, p in unet.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_gradients_are_those_of_the_merged_model():
    unet = tiny_unet().double().requires_grad_(False)
    apply_patch(unet, "grid", keep_rate=0.25)  # clusters that don't move with the input
    weight = find_sites(unet)[0].attention.to_k.weight.requires_grad_(True)
    inputs = unet_inputs(batch=1, height=8, width=8, dtype=torch.float64)

    def loss():
        return unet(**inputs).sample.square().sum()

    loss().backward()
    with torch.no_grad():
        weight[0, 0] += 1e-5
        above = loss()
        weight[0, 0] -= 2e-5
        below = loss()
    torch.testing.assert_close(weight.grad[0, 0], (above - below) / 2e-5, rtol=1e-4, atol=0)


class TestPerturbedAttentionGuidance:
    def picture(self, pipe):
        return pipe(
            "a dog",
            num_inference_steps=2,
            height=64,
            width=64,
            pag_scale=3.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images

    def pipeline(self):
        pipe = StableDiffusionPAGPipeline(
            **tiny_sd15().components,
            requires_safety_checker=False,
            pag_applied_layers=["down_blocks.0"],
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def test_merges_in_all_blocks(self):
        pipe = self.pipeline()
        plain = self.picture(pipe)
        handle = apply_patch(pipe, "tome-sd")
        with traced(find_sites(pipe.unet)[0].attention) as trace:
            merged = self.picture(pipe)
        assert trace.inputs[0].shape == (3, 32, 32)  # 32 of 64 tokens; three times one image
        assert merged_blocks(handle) == 5
        assert not torch.allclose(merged, plain, atol=1e-3)
        handle.remove()
        assert torch.equal(self.picture(pipe), plain)


def test_img2img():
    pipe = StableDiffusionImg2ImgPipeline(**tiny_sd15().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(1))

    def redraw():
        generator = torch.Generator().manual_seed(0)
        return pipe("a dog", picture, 0.6, 5, generator=generator, output_type="latent").images

    plain = redraw()
    with apply_patch(pipe, "tome-sd", keep_rate=0.25) as handle:
        merged = redraw()
    assert not torch.allclose(merged, plain, atol=1e-3)
    row = handle.report().rows[0]
    assert (row.grid, row.tokens_after) == (Grid(12, 8), 24)
    assert torch.equal(redraw(), plain)


def test_sdxl_pipeline_with_lora_fusing():
    pipe = tiny_sdxl()
    add_lora(pipe.unet)
    inputs = unet_inputs("sdxl")
    with torch.no_grad():
        handle = apply_patch(pipe, "tome-sd", features="keys")
        merged = pipe.unet(**inputs).sample
        pipe.unet.fuse_lora()
        torch.testing.assert_close(pipe.unet(**inputs).sample, merged, rtol=0, atol=1e-5)
        pipe.unet.unfuse_lora()
        torch.testing.assert_close(pipe.unet(**inputs).sample, merged, rtol=0, atol=1e-5)
    assert merged_blocks(handle) == 10


def test_moving_and_casting_a_patched_unet():
    unet, expected = tiny_unet(), tiny_unet().to(torch.bfloat16)
    apply_patch(unet, "grid")
    apply_patch(expected, "grid")
    unet.to(torch.bfloat16)
    inputs = unet_inputs(dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(unet(**inputs).sample, expected(**inputs).sample)
