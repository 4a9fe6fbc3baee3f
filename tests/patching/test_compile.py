"""torch.compile before and after patching: one graph, and never a silent bypass."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock

from sd_tokenmerge import METHODS, apply_patch, remove_patch
from tests.tiny_models import UNET_CONFIGS, call_unet, tiny_unet, unet_inputs

ATC_KEYS = {"method": "atc", "features": "keys"}
KV = {"method": "tome-sd", "merge": "kv", "proportional_attention": True}
KEPT = {"method": "tome-sd", "refresh_every": 2, "share_layers": True}
RANDOM = {"method": "tome-sd:random=true"}
SCORED = {"method": "kmedoids:weighted=true", "merge": "q"}


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch._dynamo.reset()


class Backend:
    """Runs graphs as they are, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


def small_unet():
    """Three merged blocks at the finest level and one in the middle: compiled in seconds."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (
            UNet2DConditionModel(
                **{
                    **UNET_CONFIGS["sd15"],
                    "block_out_channels": [32, 64],
                    "layers_per_block": 1,
                    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
                    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
                }
            )
            .requires_grad_(False)
            .eval()
        )


def compiled(unet, how, backend):
    """Compile the whole UNet into a new object, in place, or block by block."""
    if how == "wrapped":
        return torch.compile(unet, backend=backend, fullgraph=True)
    if how == "in place":
        unet.compile(backend=backend, fullgraph=True)
    else:
        unet.compile_repeated_blocks(backend=backend, fullgraph=True)
    return unet


HOW = ["wrapped", "in place", "block by block"]
QUICK = [("wrapped", KV), ("wrapped", KEPT), ("block by block", RANDOM)]
MATRIX = [
    pytest.param(how, options, marks=() if (how, options) in QUICK else pytest.mark.slow)
    for how in HOW
    for options in (ATC_KEYS, KV, KEPT, RANDOM, SCORED)
]


@pytest.mark.parametrize(("how", "options"), MATRIX, ids=str)
def test_every_order(how, options):
    eager = small_unet()
    plain = call_unet(eager)
    apply_patch(eager, **options)
    merged = call_unet(eager)
    assert not torch.allclose(merged, plain, atol=1e-3)

    unet = small_unet()
    module = compiled(unet, how, Backend())
    states = [True, False, True, False]
    if options is KV:  # also patched before the first call
        states = [False, *states]
    for patch in states:
        handle = apply_patch(module, **options) if patch else None
        expected = merged if patch else plain
        for _ in range(2):
            torch.testing.assert_close(call_unet(module), expected, rtol=0, atol=1e-6)
        if handle is not None:
            rows = [row for row in handle.report().rows if row.merged]
            assert [row.times_computed + row.times_reused for row in rows] == [2] * len(rows)
            remove_patch(module)


@pytest.mark.parametrize(
    "how", [*(pytest.param(how, marks=pytest.mark.slow) for how in HOW[:2]), "block by block"]
)
def test_another_patch_takes_effect(how):
    unet, eager = small_unet(), small_unet()
    module = compiled(unet, how, Backend())
    for options in (
        {"method": "tome-sd"},
        {"method": "kmedoids", "keep_rate": 0.3},
        {"method": "tome-sd:random=true", "keep_rate": 0.3, "seed": 5},
        {"method": "tome-sd", "features": "keys"},
    ):
        apply_patch(eager, replace=True, **options)
        apply_patch(module, replace=True, **options)
        torch.testing.assert_close(call_unet(module), call_unet(eager), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("how", "options"), [case for case in MATRIX if case.values[0] != "block by block"], ids=str
)
def test_one_graph_for_all_steps(how, options):
    eager, unet, backend = small_unet(), small_unet(), Backend()
    apply_patch(eager, **options)
    handle = apply_patch(unet, **options)
    module = compiled(unet, how, backend)
    for _ in range(2):  # generations
        for timestep in torch.arange(900, 0, -100):
            inputs = {**unet_inputs(), "timestep": timestep}
            with torch.no_grad():
                torch.testing.assert_close(
                    module(**inputs).sample, eager(**inputs).sample, rtol=0, atol=1e-6
                )
    assert backend.graphs == 1
    first, second, *_ = (row for row in handle.report().rows if row.merged)
    if options is KEPT:
        assert (first.times_computed, first.times_reused) == (10, 8)
        assert (second.times_computed, second.times_reused) == (0, 18)
    else:
        assert (first.times_computed, first.times_reused) == (18, 0)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_one_graph(method):
    eager, unet, backend = small_unet(), small_unet(), Backend()
    apply_patch(eager, method)
    apply_patch(unet, method)
    module = compiled(unet, "wrapped", backend)
    for timestep in (900, 500, 100):
        expected = call_unet(eager, timestep=timestep)
        torch.testing.assert_close(
            call_unet(module, timestep=timestep), expected, rtol=0, atol=1e-6
        )
    assert backend.graphs == 1


def test_blocks_of_the_same_shape_share_a_graph():
    unet, backend = tiny_unet(), Backend()
    apply_patch(unet, "tome-sd:random=true", levels=4, refresh_every=2)
    compiled(unet, "block by block", backend)
    for timestep in torch.arange(900, 500, -100):
        with torch.no_grad():
            unet(**{**unet_inputs(), "timestep": timestep})
    assert sum(isinstance(module, BasicTransformerBlock) for module in unet.modules()) == 16
    assert backend.graphs == 4  # one per level


def test_a_copy_is_compiled_as_itself():
    unet = small_unet()
    handle = apply_patch(unet, **KEPT)
    expected = call_unet(unet)
    module = compiled(copy.deepcopy(unet), "in place", Backend())
    torch.testing.assert_close(call_unet(module), expected, rtol=0, atol=1e-6)
    assert handle.report().rows[0].times_computed == 1


def test_other_sizes_are_recompiled_once():
    eager, unet, backend = small_unet(), small_unet(), Backend()
    apply_patch(eager, "tome-sd", keep_rate=0.6)
    apply_patch(unet, "tome-sd", keep_rate=0.6)
    module = compiled(unet, "wrapped", backend)
    for height, width in [(16, 16), (20, 24), (24, 28), (32, 18), (16, 16)]:
        torch.testing.assert_close(
            call_unet(module, height=height, width=width),
            call_unet(eager, height=height, width=width),
            rtol=0,
            atol=1e-6,
        )
    assert backend.graphs == 2  # static, then dynamic


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="torch is too old")
def test_a_cuda_graph_does_not_replay_the_choice_of_one_step():
    assert torch.Tag.cudagraph_unsafe in torch.ops.sd_tokenmerge.choose_labels.default.tags


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:TensorFloat32:UserWarning")
@pytest.mark.parametrize(("every", "computed"), [(1, 8), (2, 4)])
def test_cuda_graphs(every, computed):
    # random clusters are others in every step, and rounding does not change them
    options = {"method": "random", "refresh_every": every}
    eager, unet = small_unet().cuda(), small_unet().cuda()
    apply_patch(eager, **options)
    handle = apply_patch(unet, **options)
    unet.compile(fullgraph=True, mode="reduce-overhead")
    inputs = {name: value.cuda() for name, value in unet_inputs().items()}
    for timestep in torch.arange(900, 100, -100, device="cuda"):
        with torch.no_grad():
            got = unet(**{**inputs, "timestep": timestep}).sample.clone()
            expected = eager(**{**inputs, "timestep": timestep}).sample
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-2)
    row = handle.report().rows[0]
    assert (row.times_computed, row.times_reused) == (computed, 8 - computed)


def test_compiled_without_a_full_graph_inside_a_larger_function():
    eager, unet = small_unet(), small_unet()
    apply_patch(eager, **KEPT)
    handle = apply_patch(unet, **KEPT)
    step = torch.compile(lambda **inputs: unet(**inputs).sample * 2, backend="eager")
    for timestep in torch.arange(900, 500, -100):
        inputs = {**unet_inputs(), "timestep": timestep}
        with torch.no_grad():
            torch.testing.assert_close(
                step(**inputs), 2 * eager(**inputs).sample, rtol=0, atol=1e-6
            )
    assert handle.report().rows[0].times_computed == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("options", [ATC_KEYS, KV, KEPT], ids=str)
def test_inductor(options):
    eager, unet = small_unet(), small_unet()
    apply_patch(eager, **options)
    handle = apply_patch(unet, **options)
    unet.compile(fullgraph=True)
    for timestep in torch.arange(900, 500, -100):
        inputs = {**unet_inputs(), "timestep": timestep}
        with torch.no_grad():
            torch.testing.assert_close(
                unet(**inputs).sample, eager(**inputs).sample, rtol=0, atol=1e-4
            )
    row = handle.report().rows[0]
    assert (row.times_computed, row.times_reused) == ((2, 2) if options is KEPT else (4, 0))
    remove_patch(unet)
    torch.testing.assert_close(call_unet(unet), call_unet(small_unet()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{"method": "atc"}, KV], ids=str)
def test_export(options):
    unet = small_unet()
    apply_patch(unet, **options)
    inputs = unet_inputs()
    program = torch.export.export(unet, (), inputs, strict=False)
    torch.testing.assert_close(
        program.module()(**inputs).sample, call_unet(unet), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("options", [KEPT, RANDOM], ids=str)
def test_export_of_what_depends_on_the_step_is_refused(options):
    unet = small_unet()
    apply_patch(unet, **options)
    with pytest.raises(RuntimeError, match="can't be combined with merging that depends on"):
        torch.export.export(unet, (), unet_inputs(), strict=False)
