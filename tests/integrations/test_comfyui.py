"""The override of the ComfyUI node, called as ComfyUI's attention functions call it."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from integrations.comfyui.override import MergedAttention
from sd_tokenmerge import METHODS, Grid, parse_method, partition
from sd_tokenmerge.attend import attend

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"
B, H, D = 2, 3, 8
GRID = Grid(8, 8)
N = GRID.num_tokens
UNET = {"activations_shape": [B, 24, *GRID[:2]], "block": ("input", 1), "block_index": 0}


def draw(tokens=N, seed=0, batch=B, **options):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, H, tokens, D, generator=generator, **options) for _ in range(3)]


def join_heads(tokens):
    return tokens.transpose(1, 2).flatten(2)


def dense(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    """Stands in for ComfyUI's attention function."""
    if not skip_reshape:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    output = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return output if skip_output_reshape else join_heads(output)


def call(override, qkv, options=UNET, **kwargs):
    kwargs = {"skip_reshape": True, "skip_output_reshape": True} | kwargs
    return override(
        dense, *qkv, H, transformer_options=options, _inside_attn_wrapper=True, **kwargs
    )


def expected(qkv, method="atc", keep=0.5, merge="kv", image=slice(0, N), seed=1):
    query, key, value = qkv
    keys = key[:, :, image]
    count = keys.shape[2]
    clusters = partition(
        keys.mean(1), method, num_clusters=int(count * keep), grid=Grid(8, count // 8), seed=seed
    ).with_singletons(image.start, key.shape[2] - image.stop)
    first_order = not parse_method(method).has_representatives
    return attend(query, key, value, clusters, merge=merge, sizes=True, first_order=first_order)


def merged(**options):
    defaults = {"method": "atc", "keep_rate": 0.5, "merge": "kv"}
    return MergedAttention(**defaults | {"refresh_every": 1, "min_tokens": 16} | options)


def run(override, *calls, latent=(B, 4, *GRID[:2])):
    """One generation with one model call for each list of attention calls."""

    def generation():
        return [
            override.apply_model(lambda x, made=made: [one() for one in made], torch.empty(latent))
            for made in calls
        ]

    return override.sample(generation)


@pytest.mark.parametrize("merge", ["kv", "two-sided"])
@pytest.mark.parametrize("skip_reshape", [True, False])
@pytest.mark.parametrize("skip_output_reshape", [True, False])
def test_unet_attention_equals_attend(merge, skip_reshape, skip_output_reshape):
    qkv = draw()
    want = expected(qkv, merge=merge)
    got = call(
        merged(merge=merge),
        qkv if skip_reshape else [join_heads(t) for t in qkv],
        skip_reshape=skip_reshape,
        skip_output_reshape=skip_output_reshape,
    )
    assert torch.equal(got, want if skip_output_reshape else join_heads(want))
    assert not torch.allclose(want, scaled_dot_product_attention(*qkv))


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method):
    qkv = draw()
    torch.testing.assert_close(call(merged(method=method), qkv), expected(qkv, method))


def test_weighted_methods_get_scores():
    override = merged(method="kmedoids:weighted=true")
    assert not torch.equal(call(override, draw()), call(merged(method="kmedoids"), draw()))
    assert override.outcomes == {"merged": 1}


def test_scale():
    query, key, value = draw()
    got = call(merged(), (query, key, value), scale=0.7)
    torch.testing.assert_close(got, expected((query * 0.7 * D**0.5, key, value)))


@pytest.mark.parametrize("image", [slice(5, 5 + N), slice(0, N), slice(3, 3 + N)])
def test_tokens_outside_the_image_are_kept(image):
    qkv = draw(5 + N)
    options = {"img_slice": [image.start, image.stop]}
    assert torch.equal(call(merged(), qkv, options), expected(qkv, image=image))


@pytest.mark.parametrize(
    ("latent", "grid"),
    [
        ((B, 4, 4, 16), Grid(4, 16)),
        ((B, 4, 7, 32), Grid(4, 16)),  # patches of two by two, padded
        ((B, 16, 2, 16, 8), Grid(8, 4, 2)),  # two frames
    ],
)
def test_the_grid_is_that_of_the_latents_patches(latent, grid):
    override, (query, key, value) = merged(method="tome-sd"), draw()
    [[got]] = run(override, [lambda: call(override, (query, key, value), {})], latent=latent)
    clusters = partition(key.mean(1), "tome-sd", num_clusters=N // 2, grid=grid)
    want = attend(query, key, value, clusters, merge="kv", sizes=True, first_order=True)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda o: call(o, [draw()[0], *draw(77)[1:]]), "cross-attention"),
        (lambda o: call(o, draw(), mask=torch.zeros(N, N)), "mask"),
        (lambda o: call(o, draw(), is_causal=True), "is_causal"),
        (lambda o: call(o, draw(), {}), "not known which tokens"),
        (lambda o: call(o, draw(), {"img_slice": [5, N + 5]}), "img_slice"),
        (lambda o: call(o, draw(), {"img_slice": [60, N]}), "fewer than 16"),
        (lambda o: call(o, draw(32)), "UNet"),
        (lambda o: call(o, draw(batch=1)), "UNet"),
    ],
)
def test_dense_for_a_reason_that_is_logged_once(make, reason, caplog):
    caplog.set_level(logging.INFO)
    override = merged()
    exact = make(merged(min_tokens=10**6))
    caplog.clear()
    for _ in range(2):
        assert torch.equal(make(override), exact)
    assert [reason in record.getMessage() for record in caplog.records] == [True]
    assert sum(override.outcomes.values()) == 2
    assert "merged" not in override.outcomes


def test_a_method_that_needs_an_unknown_grid_is_dense():
    override, options = merged(method="tome-sd"), {"img_slice": [0, N]}
    assert torch.equal(call(override, draw(), options), dense(*draw(), H, None, True, True))
    assert "needs the grid" in next(iter(override.outcomes))


def test_a_keep_rate_that_the_method_cannot_reach():
    with pytest.raises(ValueError, match=r"at least 0\.25"):
        merged(method="tome-sd", keep_rate=0.1)
    override = merged(method="tome-sd:stride=3", keep_rate=0.11, min_tokens=1)
    call(override, draw(9, batch=B), {"activations_shape": [B, 1, 3, 3]})
    call(override, draw(4, batch=B), {"activations_shape": [B, 1, 2, 2]})
    assert override.outcomes["merged"] == 1
    assert "num_clusters" in list(override.outcomes)[1]


@pytest.mark.parametrize(
    "options", [{"merge": "qkv"}, {"min_tokens": 0}, {"refresh_every": 0}, {"method": "none"}]
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        merged(**options)


def test_dense_calls_go_to_the_previous_override():
    seen = []

    def previous(func, *args, **kwargs):
        seen.append((func, args, kwargs))
        return "previous"

    override = merged(previous=previous)
    qkv = draw()
    mask = torch.zeros(N, N)
    assert override(dense, *qkv, H, mask, skip_reshape=True) == "previous"
    assert seen == [(dense, (*qkv, H, mask), {"skip_reshape": True})]
    assert torch.equal(call(override, qkv), expected(qkv))
    assert len(seen) == 1


def test_clusters_are_kept_per_layer_and_conditions():
    override = merged(refresh_every=2)
    first, second = draw(seed=1), draw(seed=2)
    other = UNET | {"uuids": ["other"]}

    def model_call(qkv, options=UNET):
        return [lambda: call(override, qkv, options), lambda: call(override, qkv[::-1], options)]

    fresh = [expected(qkv) for qkv in (first, second, first[::-1], second[::-1])]
    # conditions run in turns; two calls share clusters, the third has new ones
    calls = [model_call(first), model_call(second, other), model_call(second), model_call(second)]
    results = run(override, *calls)
    assert torch.equal(results[0][0], fresh[0])
    assert torch.equal(results[0][1], fresh[2])
    assert torch.equal(results[1][0], fresh[1])
    assert not torch.allclose(results[2][0], fresh[1])
    assert not torch.allclose(results[2][1], fresh[3])
    assert torch.equal(results[3][0], fresh[1])


def test_a_generation_starts_without_clusters():
    override = merged(refresh_every=100)
    [[first]] = run(override, [lambda: call(override, draw(seed=1))])
    [[second]] = run(override, [lambda: call(override, draw(seed=2))])
    assert torch.equal(first, expected(draw(seed=1)))
    assert torch.equal(second, expected(draw(seed=2)))

    def interrupted():
        call(override, draw(seed=1))
        raise InterruptedError

    with pytest.raises(InterruptedError):
        override.sample(interrupted)
    assert torch.equal(call(override, draw(seed=2)), expected(draw(seed=2)))


def test_random_clusters_repeat_with_the_generation():
    override = merged(method="random")
    layers = [lambda: call(override, draw())] * 2
    [one], [again] = run(override, layers), run(override, layers)
    assert not torch.equal(one[0], one[1])
    assert torch.equal(one[0], again[0])
    assert torch.equal(one[1], again[1])


def test_copied_model_options_hold_the_same_object():
    override = merged()
    assert copy.deepcopy({"transformer_options": {"key": override}}) == {
        "transformer_options": {"key": override}
    }


def test_the_workflow_has_the_nodes_inputs_with_their_defaults(monkeypatch):
    io = MagicMock(ComfyNode=object)
    for name in ("comfy", "comfy.patcher_extension", "comfy_api"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    latest = SimpleNamespace(io=io, ComfyExtension=object)
    monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
    importlib.import_module("integrations.comfyui.nodes").TokenMerge.define_schema()
    made = [call for call in io.mock_calls if call[0].endswith(".Input")]
    defaults = {args[0]: options.get("default") for _, args, options in made}

    workflow = json.loads((FOLDER / "workflow.json").read_text(encoding="utf-8"))
    [node] = [node for node in workflow.values() if node["class_type"] == "SDTokenMerge"]
    assert node["inputs"] == defaults | {"model": ["1", 0]}
    assert io.Schema.call_args.kwargs["node_id"] == "SDTokenMerge"
    links = [value for node in workflow.values() for value in node["inputs"].values()]
    assert {link[0] for link in links if isinstance(link, list)} < set(workflow)
    del defaults["model"]
    MergedAttention(**defaults)
