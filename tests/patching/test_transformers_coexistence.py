"""Token merging together with whatever else is done to a transformer, in either order."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from packaging.version import Version
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from sd_tokenmerge import apply_patch
from sd_tokenmerge.patching.sites import find_sites
from tests.tiny_transformers import (
    CHANNELS,
    DIM,
    FAMILIES,
    HEADS,
    HEIGHT,
    TEXT,
    WIDTH,
    call_transformer,
    draw,
    inputs_of,
    tiny_transformer,
)

PATCHES = [
    {"method": "tome-sd"},
    {"method": "tome-sd", "features": "keys", "merge": "two-sided"},
]
in_every_family = pytest.mark.parametrize("name", FAMILIES)


@dataclass
class Change:
    """Something done to a transformer, and how to undo it (None: it can't be)."""

    name: str
    do: Callable[[Any], Any]
    undo: Callable[[Any], Any] | None = None

    def __str__(self):
        return self.name


def add_lora(model):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        targets = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj"]
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    model.requires_grad_(False)


def group_offload(model, kind):
    if Version(diffusers.__version__) < Version("0.41") and not torch.accelerator.is_available():
        pytest.skip("diffusers before 0.41 offloads groups only beside an accelerator")
    apply_group_offloading(
        model,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=kind,
        **({"num_blocks_per_group": 1} if kind == "block_level" else {}),
    )


def cast_layerwise(model):
    model.enable_layerwise_casting(torch.float16, torch.float32)


CHANGES = [
    Change("LoRA", add_lora, lambda m: m.delete_adapters("default")),
    Change("sequential offload", lambda m: accelerate.cpu_offload(m, execution_device="cpu")),
    Change("group offload", lambda m: group_offload(m, "leaf_level")),
    Change("block offload", lambda m: group_offload(m, "block_level")),
    Change("layerwise casting", cast_layerwise),
    Change(
        "native backend",
        lambda m: m.set_attention_backend("native"),
        lambda m: m.reset_attention_backend(),
    ),
]


IMPOSSIBLE = {
    ("pixart", "LoRA"),
    ("hunyuandit", "LoRA"),
    ("hunyuandit", "sequential offload"),
}
"""What diffusers can't do to these models."""
FUSABLE = ("auraflow", "cogvideox", "flux", "flux2", "hunyuandit", "pixart", "sd3", "wan")
"""Where `fuse_qkv_projections` works without merging."""


def merged_blocks(handle):
    return sum(row.times_computed > 0 for row in handle.report().rows)


def check_either_order(name, change, options):
    first, second = tiny_transformer(name), tiny_transformer(name)
    change.do(first)
    changed = call_transformer(first, name)
    handles = [apply_patch(first, **options), apply_patch(second, **options)]
    merged = call_transformer(second, name)
    change.do(second)
    outputs = [call_transformer(first, name), call_transformer(second, name)]
    assert torch.equal(*outputs)
    assert {merged_blocks(handle) for handle in handles} == {len(find_sites(first))}
    assert not torch.allclose(outputs[0], changed, rtol=0, atol=1e-5)
    handles[0].remove()
    assert torch.equal(call_transformer(first, name), changed)
    if change.undo is not None:
        change.undo(second)
        assert torch.equal(call_transformer(second, name), merged)


@pytest.mark.parametrize("options", PATCHES, ids=str)
@pytest.mark.parametrize("change", CHANGES, ids=str)
@in_every_family
def test_order_does_not_matter(name, change, options):
    if (name, change.name) in IMPOSSIBLE:
        pytest.skip("impossible without merging as well")
    check_either_order(name, change, options)


@pytest.mark.parametrize("options", PATCHES, ids=str)
@pytest.mark.parametrize("name", [name for name in FUSABLE if name in FAMILIES])
def test_fused_projections(name, options):
    fuse = Change(
        "fused projections",
        lambda model: model.fuse_qkv_projections(),
        lambda model: model.unfuse_qkv_projections(),
    )
    check_either_order(name, fuse, options)


@pytest.mark.parametrize("name", ["flux", "qwen_image", "wan"])
def test_other_backends_are_refused_also_after_the_patch(name):
    model = tiny_transformer(name)
    plain = call_transformer(model, name)
    handle = apply_patch(model, "grid", merge="two-sided")
    model.set_attention_backend("_native_math")
    try:
        with pytest.raises(RuntimeError, match="the attention backend _native_math can't"):
            call_transformer(model, name)
    finally:
        model.set_attention_backend("native")
    handle.remove()
    assert torch.equal(call_transformer(model, name), plain)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_backends_that_are_active_in_a_context_run_the_merged_attention(name):
    model = tiny_transformer(name)
    apply_patch(model, "grid", merge="two-sided")
    merged = call_transformer(model, name)
    with attention_backend("_native_math"):
        got = call_transformer(model, name)
    torch.testing.assert_close(got, merged, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("flux", lambda: FluxIPAdapterAttnProcessor(CHANNELS, 16)),
        ("sd3", lambda: SD3IPAdapterJointAttnProcessor2_0(CHANNELS, 16, DIM, HEADS)),
    ],
)
def test_ip_adapters_are_refused(name, make):
    model = tiny_transformer(name)
    processors = dict.fromkeys(model.attn_processors, make())
    plain = model.attn_processors
    handle = apply_patch(model, "grid")
    model.set_attn_processor(processors)
    with pytest.raises(RuntimeError, match=f"got {type(make()).__name__}"):
        call_transformer(model, name)
    handle.remove()
    with pytest.raises(RuntimeError, match=f"got {type(make()).__name__}"):
        apply_patch(model, "grid")
    model.set_attn_processor(plain)
    apply_patch(model, "grid")


@dataclass
class Owner:
    """The least that counts as a pipeline."""

    transformer: Any

    def __post_init__(self):
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.scheduler.set_timesteps(8)


def steps_of(owner, name):
    scale = 1000 if inputs_of(name)["timestep"].max() < 1 else 1
    steps = [t.expand(2) if scale == 1 else t.expand(2) / scale for t in owner.scheduler.timesteps]
    return [1 - step for step in steps] if name == "lumina2" else steps


def pyramid_attention_broadcast():
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )


def faster_cache():
    return diffusers.FasterCacheConfig(
        current_timestep_callback=lambda: 500, is_guidance_distilled=True
    )


def taylor_seer_cache():
    if not hasattr(diffusers, "TaylorSeerCacheConfig"):
        pytest.skip("this version of diffusers has no such cache")
    return diffusers.TaylorSeerCacheConfig()


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("flux", pyramid_attention_broadcast),
        ("wan", pyramid_attention_broadcast),
        ("flux", faster_cache),
        ("wan", faster_cache),
        ("flux", taylor_seer_cache),
    ],
)
def test_caches_of_attentions_are_refused(name, config):
    model = tiny_transformer(name)
    plain = call_transformer(model, name)
    handle = apply_patch(model, "grid")
    model.enable_cache(config())
    with pytest.raises(RuntimeError, match=r"the cache '\w+' on a self-attention"):
        call_transformer(model, name)
    handle.remove()
    with pytest.raises(RuntimeError, match=r"the cache '\w+' on a self-attention"):
        apply_patch(model, "grid")
    model.disable_cache()
    assert torch.equal(call_transformer(model, name), plain)


def run_all_steps(model, name, **options):
    """Outputs of eight steps on changing latents, and the report."""
    owner = Owner(model)
    outputs = []
    with apply_patch(owner, "tome-sd", merge="two-sided", **options) as handle:
        for index, timestep in enumerate(steps_of(owner, name)):
            latents = inputs_of(name)["hidden_states"].roll(index, -1)
            with model.cache_context("cond"):
                outputs.append(
                    call_transformer(model, name, timestep=timestep, hidden_states=latents)
                )
    return outputs, [row for row in handle.report().rows if row.merged]


def test_a_first_block_cache_skips_merged_blocks():
    model = tiny_transformer("flux")
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e9))
    outputs, (first, *others) = run_all_steps(model, "flux", refresh_every=2)
    assert (first.times_computed, first.times_reused) == (4, 4)
    for row in others:
        assert (row.times_computed, row.times_reused) == (1, 0)
    assert all(output.isfinite().all() for output in outputs)


def test_partitions_are_not_kept_over_skipped_refreshes():
    model = tiny_transformer("flux")
    if not hasattr(diffusers, "MagCacheConfig"):
        pytest.skip("this version of diffusers has no MagCache")
    cache = diffusers.MagCacheConfig(
        threshold=1e9,
        max_skip_steps=2,
        retention_ratio=0.125,
        num_inference_steps=8,
        mag_ratios=[1.0] * 8,
    )
    model.enable_cache(cache)  # blocks run in the steps 0, 3 and 6
    _, rows = run_all_steps(model, "flux", refresh_every=2)
    for row in rows:
        assert (row.times_computed, row.times_reused) == (3, 0)
    _, rows = run_all_steps(tiny_transformer("flux"), "flux", refresh_every=2)
    for row in rows:
        assert (row.times_computed, row.times_reused) == (4, 4)


@pytest.mark.parametrize("name", ["lumina2", "qwen_image", "wan", "sd3"])
def test_guidance_by_separate_calls_keeps_partitions_apart(name):
    """Some pipelines call the denoiser with the prompt, then without it, in every step."""
    prompts = [inputs_of(name)["encoder_hidden_states"], draw(2, TEXT, 24, seed=7)]

    def outputs_for(which):
        owner = Owner(tiny_transformer(name))
        handle = apply_patch(owner, "tome-sd", merge="two-sided", refresh_every=2)
        outputs = {}
        for index, timestep in enumerate(steps_of(owner, name)):
            for prompt in which:
                latents = inputs_of(name)["hidden_states"].roll(index + 3 * prompt, -1)
                outputs[index, prompt] = call_transformer(
                    owner.transformer,
                    name,
                    timestep=timestep,
                    hidden_states=latents,
                    encoder_hidden_states=prompts[prompt],
                )
        rows = handle.report().rows
        assert {row.times_reused for row in rows} == {4 * len(which)}
        return outputs

    together = outputs_for([0, 1])
    for place, output in (outputs_for([0]) | outputs_for([1])).items():
        assert torch.equal(together[place], output)


def test_timesteps_of_each_token():
    """Wan 2.2 gives the tokens of a known first frame timestep 0."""
    owner = Owner(tiny_transformer("wan"))
    handle = apply_patch(owner, "tome-sd", merge="two-sided", refresh_every=2)
    for timestep in owner.scheduler.timesteps:
        timesteps = timestep.repeat(2, HEIGHT * WIDTH)
        timesteps[:, : HEIGHT * WIDTH // 2] = 0
        for _ in range(2):
            call_transformer(owner.transformer, "wan", timestep=timesteps)
    for row in handle.report().rows:
        assert (row.times_computed, row.times_reused) == (8, 8)


@pytest.mark.parametrize(("merge", "features"), [("kv", "keys"), ("two-sided", "input")])
@pytest.mark.parametrize("name", ["lumina2", "qwen_image"])
def test_prompts_of_different_lengths(name, merge, features):
    """An image's output depends neither on the padding of its prompt nor on its neighbour's."""
    model, inputs = tiny_transformer(name), inputs_of(name)
    (mask,) = (key for key in inputs if key.startswith("encoder_") and key.endswith("_mask"))
    noisy = inputs["encoder_hidden_states"].clone()
    noisy[1, 3:] = 5.0
    plain = call_transformer(model, name)
    if not torch.equal(call_transformer(model, name, encoder_hidden_states=noisy), plain):
        pytest.skip("this version of diffusers attends to padding")
    apply_patch(model, "tome-sd", merge=merge, keep_rate=0.3, features=features)
    output = call_transformer(model, name)
    assert torch.equal(call_transformer(model, name, encoder_hidden_states=noisy), output)
    for image, length in enumerate((5, 3)):
        alone = {
            key: value[image : image + 1]
            for key, value in inputs.items()
            if isinstance(value, (torch.Tensor, list))
        }
        alone["encoder_hidden_states"] = alone["encoder_hidden_states"][:, :length]
        alone[mask] = alone[mask][:, :length]
        expected = call_transformer(model, name, **alone)
        torch.testing.assert_close(output[image : image + 1], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("flux", "controlnet_block_samples"),
        ("qwen_image", "controlnet_block_samples"),
        ("sd3", "block_controlnet_hidden_states"),
    ],
)
def test_inputs_of_controlnets(name, argument):
    model = tiny_transformer(name)
    if argument not in inspect.signature(model.forward).parameters:
        pytest.skip("this version of diffusers has no ControlNet for it")
    residual = draw(2, HEIGHT * WIDTH, CHANNELS, seed=5)
    given = {argument: [residual]}
    plain = call_transformer(model, name, **given)
    assert not torch.allclose(plain, call_transformer(model, name), atol=1e-3)
    with apply_patch(model, "grid", keep_rate=1, merge="two-sided"):
        assert torch.equal(call_transformer(model, name, **given), plain)
    with apply_patch(model, "grid", merge="two-sided"):
        merged = call_transformer(model, name, **given)
    assert merged.isfinite().all()
    assert not torch.allclose(merged, plain, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of the models' own layer norms
@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("merge", ["qkv", "kv", "two-sided"])
@in_every_family
def test_precision(name, merge, how):
    """Merging loses no more to rounding than the model itself does."""

    def outputs(patched):
        model = tiny_transformer(name)
        if patched:
            apply_patch(model, "grid", keep_rate=0.5, merge=merge)
        exact = call_transformer(model, name)
        if how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return exact, call_transformer(model, name)
        dtype = getattr(torch, how)
        inputs = {
            key: value.to(dtype)
            for key, value in inputs_of(name).items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        }
        rounded = call_transformer(model.to(dtype), name, **inputs)
        assert rounded.dtype == dtype
        return exact, rounded

    errors = [(rounded - exact).abs().max() for exact, rounded in map(outputs, (False, True))]
    assert 0 < errors[1] < 3 * errors[0]


LONG = 32
"""Height and width in tokens of the pictures whose memory is measured."""


def long_inputs(name):
    """Inputs of one picture of LONG x LONG tokens."""
    tokens = LONG * LONG
    inputs = {
        key: value[:1] if isinstance(value, (torch.Tensor, list)) else value
        for key, value in inputs_of(name).items()
    }
    if name in ("sd3", "pixart"):
        return inputs | {"hidden_states": draw(1, 4, 2 * LONG, 2 * LONG)}
    if name == "wan":
        return inputs | {"hidden_states": draw(1, 4, 4, LONG, LONG)}
    channels = inputs["hidden_states"].shape[-1]
    inputs["hidden_states"] = draw(1, tokens, channels)
    if name == "qwen_image":
        mask = torch.ones(1, TEXT, dtype=torch.int64)
        mask[0, 3:] = 0
        return inputs | {"img_shapes": [[(1, LONG, LONG)]], "encoder_hidden_states_mask": mask}
    positions = torch.cartesian_prod(*map(torch.arange, (1, LONG, LONG)))
    return inputs | {"img_ids": positions.float(), "txt_ids": torch.zeros(TEXT, 3)}


def largest_allocation(model, inputs):
    with (
        torch.no_grad(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        model(**inputs)
    events = profiler.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("merge", ["qkv", "kv", "two-sided"])
@pytest.mark.parametrize("name", ["flux", "pixart", "qwen_image", "sd3", "wan"])
def test_no_matrix_of_all_pairs(name, merge):
    """No array has an element for each pair of a token and a cluster."""
    model, inputs = tiny_transformer(name), long_inputs(name)
    pairs = LONG**4 // 2 * torch.float32.itemsize
    with sdpa_kernel(SDPBackend.MATH):
        assert largest_allocation(model, inputs) > pairs
    with apply_patch(model, "grid", keep_rate=0.5, merge=merge):
        assert largest_allocation(model, inputs) < pairs
