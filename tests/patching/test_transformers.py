"""Merging in diffusers' transformers: image tokens are merged, text tokens stay."""

from __future__ import annotations

import copy
import pickle
from typing import get_args

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.models.attention_processor import AttnProcessor, PAGJointAttnProcessor2_0
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sd_tokenmerge import Linear, apply_patch, remove_patch
from sd_tokenmerge.config import Merge
from sd_tokenmerge.methods.base import Grid
from sd_tokenmerge.methods.grid_pooling import GridPooling
from sd_tokenmerge.patching.families import FAMILIES as SUPPORTED
from sd_tokenmerge.patching.sites import find_sites
from tests.patching.spies import SpyMethod
from tests.reference.attend import attend as reference
from tests.tiny_transformers import (
    FAMILIES,
    HEIGHT,
    TEXT,
    WIDTH,
    call_transformer,
    draw,
    inputs_of,
    tiny_transformer,
)

IMAGE = HEIGHT * WIDTH
TEXT_FIRST = ("auraflow", "cogvideox", "flux", "flux2", "lumina2", "qwen_image")
JOINT = tuple(name for name in (*TEXT_FIRST, "sd3", "sd35") if name in FAMILIES)
in_every_family = pytest.mark.parametrize("name", FAMILIES)
in_every_form = pytest.mark.parametrize("merge", get_args(Merge))


class SlowTwin(TorchFunctionMode):
    """Replaces each self-attention by the slow reference, on clusters of 2 x 2 image tokens.

    Text tokens are clusters by themselves.
    """

    def __init__(self, name, merge):
        super().__init__()
        self.name, self.merge, self.calls = name, merge, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention:
            query, key, value = args or [kwargs[name] for name in ("query", "key", "value")]
            if query.shape[2] == key.shape[2] > TEXT:
                self.calls += 1
                return self.attend(query, key, value, kwargs)
        return function(*args, **kwargs)

    def attend(self, query, key, value, options):
        batch, _, length, channels = query.shape
        text = length - IMAGE
        labels = clusters(batch)
        new = torch.arange(IMAGE // 4, IMAGE // 4 + text).expand(batch, -1)
        scale = options.get("scale") or channels**-0.5
        mask = options.get("attn_mask")
        is_sized = self.merge in ("kv", "two-sided")
        images = []
        for image in range(batch):
            kept = torch.ones(length, dtype=torch.bool) if mask is None else mask[image, 0, 0]
            # Lumina2's padding is at the end
            before = int(kept.sum()) - IMAGE if self.name == "lumina2" else text
            if self.name not in TEXT_FIRST:
                before = 0
            order = (new[:, :before], labels, new[:, before:])
            rows = torch.cat(order, 1)[image : image + 1]
            images.append(
                masked_reference(
                    [t[image : image + 1] for t in (query * scale * channels**0.5, key, value)],
                    rows,
                    kept,
                    self.merge,
                    is_sized,
                )
            )
        return torch.cat(images).to(query.dtype)


def masked_reference(tensors, labels, kept, merge, is_sized):
    """The reference, as if masked tokens were not there; their own outputs are zero."""
    if kept.all():
        return reference(*tensors, labels, merge, is_sized, is_sized)
    present = [tensor[:, :, kept] for tensor in tensors]
    renumbered = labels[:, kept].unique(return_inverse=True)[1]
    output = torch.zeros_like(tensors[0], dtype=torch.float64)
    output[:, :, kept] = reference(*present, renumbered, merge, is_sized, is_sized)
    return output


def grid_of(name):
    is_video = SUPPORTED[FAMILIES[name]()[0].__name__].makes_videos
    return Grid(HEIGHT // 2, WIDTH, frames=2) if is_video else Grid(HEIGHT, WIDTH)


def clusters(batch):
    """Cells of 2 x 2 tokens: the same in an image and in a video."""
    tokens = torch.zeros(batch, IMAGE, 1)
    grid = Grid(HEIGHT, WIDTH)
    return GridPooling()(tokens, IMAGE // 4, grid=grid, seed=0).labels


def patch(model, **options):
    return apply_patch(model, "grid", keep_rate=0.25, **options)


@in_every_form
@in_every_family
def test_equals_the_slow_twin(name, merge):
    model = tiny_transformer(name)
    plain = call_transformer(model, name)
    with SlowTwin(name, merge) as twin:
        expected = call_transformer(model, name)
    with patch(model, merge=merge) as handle:
        got = call_transformer(model, name)
    assert twin.calls == sum(row.merged for row in handle.report().rows) >= 2
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert (got - plain).abs().max() > (2e-5 if merge == "two-sided" else 1e-4)
    assert torch.equal(call_transformer(model, name), plain)


@in_every_form
@in_every_family
def test_keep_rate_one_is_bit_identical(name, merge):
    model = tiny_transformer(name)
    plain = call_transformer(model, name)
    apply_patch(model, keep_rate=1, merge=merge)
    assert torch.equal(call_transformer(model, name), plain)


@in_every_family
def test_permuting_the_batch_permutes_the_output(name):
    model = tiny_transformer(name)
    apply_patch(model, "atc", keep_rate=0.3, merge="two-sided", features="keys")
    inputs = inputs_of(name)
    flipped = {
        key: value.flip(0)
        for key, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.shape[0] == 2 and key != "txt_ids"
    }
    got = call_transformer(model, name, **flipped)
    expected = call_transformer(model, name).flip(0)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("features", ["input", "keys"])
@in_every_family
def test_methods_see_the_image_alone(name, features):
    model, spy = tiny_transformer(name), SpyMethod(scored=True)
    apply_patch(model, spy, keep_rate=0.25, features=features, merge="two-sided")
    call_transformer(model, name)
    assert len(spy.calls) == len(find_sites(model))
    for call in spy.calls:
        assert call.tokens.shape[:2] == (2, IMAGE)
        assert call.grid == grid_of(name)
        assert call.scores.shape == (2, IMAGE)


@pytest.mark.parametrize("merge", ["q", "two-sided"])
@pytest.mark.parametrize("name", JOINT)
def test_outputs_for_text_tokens_are_exact(name, merge):
    is_lumina2 = name == "lumina2"
    changes = {"num_refiner_layers": 0} if is_lumina2 else {}
    model, outputs = tiny_transformer(name, **changes), []

    def record(_, args, output):  # Lumina2's captions have at least three tokens
        outputs.append((output[:, TEXT:IMAGE], output[:, :3]) if is_lumina2 else output)

    attention = find_sites(model)[0].attention
    attention.register_forward_hook(record)
    call_transformer(model, name)
    patch(model, merge=merge)
    call_transformer(model, name)
    (image, text), (merged_image, merged_text) = outputs
    torch.testing.assert_close(merged_text, text, rtol=0, atol=1e-5)
    assert (merged_image - image).abs().max() > 1e-4


@in_every_family
def test_reports_show_frames_and_text_tokens(name):
    model = tiny_transformer(name)
    with (
        apply_patch(model, GridPooling(), keep_rate=0.25, merge="kv") as handle,
        handle.record() as recording,
    ):
        call_transformer(model, name)
    report = handle.report()
    for recorded in recording.steps[0].partitions.values():
        assert recorded.labels.shape == (2, *grid_of(name).shape)
    texts = {row.text_tokens for row in report.rows}
    registers = 8 if name == "auraflow" else 0  # it adds tokens of its own to the text
    is_mixed = name in ("lumina2", "sd35")
    assert texts == ({0, TEXT} if is_mixed else {TEXT + registers if name in JOINT else 0})
    assert f" {'2x4x6' if grid_of(name).frames == 2 else '8x6'} " in str(report)
    assert (f" 48 -> 12, {TEXT + registers} of text " in str(report)) == (name in JOINT)
    assert " 48 -> 12 " in str(report) or 0 not in texts


def test_positions_are_read_again_only_when_they_change(monkeypatch):
    model, positions = tiny_transformer("flux"), inputs_of("flux")["img_ids"]
    handle, read = patch(model), []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.append(self) or plain(self))
    for _ in range(2):
        call_transformer(model, "flux", img_ids=positions)
    assert len(read) == 1
    positions.copy_(positions[:, [0, 2, 1]])  # rows and columns change places
    call_transformer(model, "flux", img_ids=positions)
    assert len(read) == 2
    assert {row.grid for row in handle.report().rows} == {Grid(WIDTH, HEIGHT)}
    with torch.inference_mode():
        for swap in ([0, 2, 1], [0, 1, 2]):
            call_transformer(model, "flux", img_ids=positions[:, swap])
    assert len(read) == 4


@in_every_family
def test_levels_and_sites(name):
    sites = find_sites(tiny_transformer(name))
    assert {site.level for site in sites} == {0}
    assert len({site.path for site in sites}) == len(sites) >= 2


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("sd3", "wrapped"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("sd3", "in place"),
                ("pixart", "wrapped"),
                ("pixart", "in place"),
                ("flux", "wrapped"),
                ("flux", "in place"),
                ("flux", "block by block"),
                ("wan", "wrapped"),
            ]
        ),
    ],
)
def test_one_graph_for_all_steps(name, how):
    torch._dynamo.reset()
    eager, model, graphs = tiny_transformer(name), tiny_transformer(name), []
    patch(eager, merge="two-sided", features="keys")

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = model
    if how == "wrapped":
        compiled = torch.compile(model, backend=backend, fullgraph=True)
    elif how == "in place":
        model.compile(backend=backend, fullgraph=True)
    else:
        model.compile_repeated_blocks(backend=backend, fullgraph=True)
    patch(compiled, merge="two-sided", features="keys")
    for step in range(8):
        timestep = inputs_of(name)["timestep"] * (1 - step / 10)
        expected = call_transformer(eager, name, timestep=timestep)
        got = call_transformer(compiled, name, timestep=timestep)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        if step == 0:
            first = len(graphs)
    assert len(graphs) == first == (1 if how != "block by block" else first)


@pytest.mark.parametrize("name", ["pixart", "sd3", "flux", "lumina2", "wan"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_transformer(name)
        apply_patch(model, "atc", keep_rate=0.25, merge="two-sided", features="keys")
        weight = find_sites(model)[0].attention.to_k.weight.requires_grad_(True)
        if checkpointing:
            model.train().enable_gradient_checkpointing()
        model(**inputs_of(name))[0].square().mean().backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


def tiny_vae():
    return AutoencoderKL(
        block_out_channels=(8,), latent_channels=1, norm_num_groups=4, scaling_factor=1.0
    )


def flux_pipeline():
    parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        transformer=tiny_transformer("flux"),
        **dict.fromkeys(parts),
    )


@pytest.mark.parametrize("steps", [8, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_known_from_rescaled_timesteps(dtype, steps):
    pipe = flux_pipeline().to(dtype)
    pipe.set_progress_bar_config(disable=True)
    rate, rates = Linear(0.25, 0.75), []
    attention = find_sites(pipe.transformer)[0].attention
    attention.register_forward_pre_hook(lambda module, _: rates.append(module._merged_block.rate))
    handle = apply_patch(pipe, "random", merge="two-sided", refresh_every=2, keep_rate=rate)
    output = pipe(
        prompt_embeds=draw(1, TEXT, 24).to(dtype),
        pooled_prompt_embeds=draw(1, 8).to(dtype),
        height=16,
        width=12,
        num_inference_steps=steps,
        output_type="latent",
    )
    assert output.images.isfinite().all()
    assert rates == [rate.at(step / steps, 0.0) for step in range(steps)]
    assert all(row.times_computed + row.times_reused == steps for row in handle.report().rows)
    assert all(row.times_reused >= steps // 2 - 2 for row in handle.report().rows)


@pytest.mark.parametrize("name", ["pixart", "sd35", "flux"])
def test_copies_work(name):
    model = tiny_transformer(name)
    patch(model, merge="two-sided")
    merged = call_transformer(model, name)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(call_transformer(copied, name), merged)
        remove_patch(copied)
        assert not torch.equal(call_transformer(copied, name), merged)


def test_every_family_is_tested():
    assert {FAMILIES[name]()[0].__name__ for name in FAMILIES} == {
        name for name in SUPPORTED if hasattr(diffusers, name)
    }


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "make"), [("sd3", PAGJointAttnProcessor2_0), ("pixart", AttnProcessor)]
    )
    def test_other_processors(self, name, make):
        model = tiny_transformer(name)
        find_sites(model)[1].attention.processor = make()
        with pytest.raises(RuntimeError, match=make.__name__):
            patch(model, merge="two-sided")

    def test_other_backends(self):
        model = tiny_transformer("flux")
        model.set_attention_backend("_native_math")
        with pytest.raises(RuntimeError, match="the attention backend"):
            patch(model, merge="two-sided")
        model.set_attention_backend("native")
        patch(model, merge="two-sided")

    def test_tokens_of_reference_images(self):
        model = tiny_transformer("qwen_image")
        patch(model)
        with pytest.raises(ValueError, match="reference images are not supported"):
            call_transformer(model, "qwen_image", img_shapes=[[(1, HEIGHT, WIDTH - 1)]] * 2)

    def test_unknown_transformers(self):
        from diffusers import SanaTransformer2DModel

        model = SanaTransformer2DModel(
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            caption_channels=8,
            sample_size=8,
        )
        with pytest.raises(TypeError, match=r"SD3Transformer2DModel.*got a SanaTransformer2DModel"):
            patch(model)


def test_the_keep_rate_must_be_reachable_on_the_grid_of_patches():
    """Latents of 6x6 are 3x3 tokens, where ToMe-SD keeps at least one of nine, not a quarter."""
    kind, config, _ = FAMILIES["sd3"]()
    apply_patch(kind(**config | {"sample_size": 6}), "tome-sd", keep_rate=0.2)
    with pytest.raises(ValueError, match="for tome-sd on a 7x7 grid"):
        apply_patch(kind(**config | {"sample_size": 14}), "tome-sd", keep_rate=0.15)
