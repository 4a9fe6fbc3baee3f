from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from diffusers.models.attention_processor import Attention
from peft import LoraConfig, inject_adapter_in_model

from sd_tokenmerge.patching import features
from sd_tokenmerge.patching.features import head_mean_keys, received_attention

TOKENS = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(0))


def make_attention(**options):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Attention(query_dim=32, heads=4, dim_head=8, **options).eval().requires_grad_(False)


def all_keys_averaged(attention, tokens):
    keys = attention.to_k(tokens).unflatten(-1, (attention.heads, -1))
    if attention.norm_k is not None:
        keys = attention.norm_k(keys)
    return sum(keys.unbind(-2)) / attention.heads


def with_hook(attention):
    attention.to_k.register_forward_hook(lambda module, args, output: 2 * output)


def with_pre_hook(attention):
    attention.to_k.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def with_lora(attention):
    config = LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False)
    inject_adapter_in_model(config, attention)


def with_offloading(attention):
    accelerate.cpu_offload(attention, execution_device="cpu")


def with_parametrization(attention):
    torch.nn.utils.parametrizations.weight_norm(attention.to_k)


def with_other_dtype(attention):
    attention.to_k = Upcasting(attention.to_k)


class Upcasting(torch.nn.Linear):
    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight.data = linear.weight.data.half()

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.float())


class QuantizedWeight(torch.Tensor):
    """As torchao's: a tensor subclass that a plain `nn.Linear` can multiply by, and little else."""

    @staticmethod
    def __new__(cls, weight):
        quantized = torch.Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=weight.dtype, device=weight.device
        )
        quantized.integers = (weight * 64).round().to(torch.int8)
        return quantized

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{function} of a quantised weight")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            tokens, weight, bias = args
            return torch.nn.functional.linear(tokens, weight.integers / 64, bias)
        return super().__torch_function__(function, types, args, kwargs or {})


def with_quantized_weight(attention):
    weight = QuantizedWeight(attention.to_k.weight.detach())
    attention.to_k.weight = torch.nn.Parameter(weight, requires_grad=False)


WRAPPINGS = [
    with_quantized_weight,
    with_hook,
    with_pre_hook,
    with_lora,
    with_offloading,
    with_parametrization,
    with_other_dtype,
]


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"qk_norm": "layer_norm"}], ids=str)
def test_head_mean_keys_are_the_averaged_keys(options):
    attention = make_attention(**options)
    torch.testing.assert_close(
        head_mean_keys(attention, TOKENS), all_keys_averaged(attention, TOKENS)
    )


def test_plain_projection_costs_one_head(monkeypatch):
    attention = make_attention()
    ran = []
    attention.to_k.forward = ran.append
    del attention.to_k.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda *_: ran.append(1))
    assert head_mean_keys(attention, TOKENS).shape == (2, 30, 8)
    assert not ran


@pytest.mark.parametrize("wrap", WRAPPINGS)
def test_wrapped_projections_are_run_in_full(wrap):
    attention = make_attention()
    wrap(attention)
    got = head_mean_keys(attention, TOKENS)
    torch.testing.assert_close(got, all_keys_averaged(attention, TOKENS))
    plain = head_mean_keys(make_attention(), TOKENS)
    assert torch.allclose(got, plain, atol=1e-6) == (
        wrap in (with_offloading, with_parametrization)
    )


@pytest.mark.parametrize("options", [{}, {"qk_norm": "layer_norm"}], ids=str)
@pytest.mark.parametrize("chunk", [1, 2 * 4 * 30 * 7, 2**24])
def test_received_attention_is_the_mean_of_the_weights(options, chunk, monkeypatch):
    monkeypatch.setattr(features, "_CHUNK_ELEMENTS", chunk)  # 1 row, 7 rows, all rows at a time
    attention = make_attention(**options).double()
    tokens = TOKENS.double()
    got = received_attention(attention, tokens)
    queries = attention.to_q(tokens).unflatten(-1, (4, 8)).transpose(1, 2)
    keys = attention.to_k(tokens).unflatten(-1, (4, 8)).transpose(1, 2)
    if options:
        queries, keys = attention.norm_q(queries), attention.norm_k(keys)
    weights = (queries @ keys.mT / 8**0.5).softmax(-1)
    torch.testing.assert_close(got, weights.mean((1, 2)).float())
    torch.testing.assert_close(got.sum(-1), torch.ones(2))


def test_received_attention_in_half_precision():
    attention = make_attention()
    expected = received_attention(attention, TOKENS)
    got = received_attention(copy.deepcopy(attention).bfloat16(), TOKENS.bfloat16())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0.03, atol=0)
