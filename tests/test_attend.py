from __future__ import annotations

from typing import get_args

import pytest
import torch

from sd_tokenmerge.attend import attend
from sd_tokenmerge.config import Merge
from sd_tokenmerge.partitions import Partition
from tests.reference.attend import attend as reference

FORMS = [
    ("qkv", False, False),
    ("qkv", True, False),
    ("kv", False, False),
    ("kv", True, False),
    ("kv", True, True),
    ("q", False, False),
    ("two-sided", True, False),
    ("two-sided", True, True),
]
B, H, N, D, K = 2, 3, 24, 8, 6
EVERY_TOKEN = torch.arange(N).expand(B, -1)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def heads(seed=0, dtype=torch.float32):
    return [draw(B, H, N, D, seed=seed + i, dtype=dtype) for i in range(3)]


def random_partition(clusters=K, seed=0, tokens=N, batch=B):
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(tokens, generator=generator) for _ in range(batch)]
    rest = torch.randint(clusters, (batch, tokens - clusters), generator=generator)
    labels = torch.cat([torch.arange(clusters).expand(batch, -1), rest], 1)
    return Partition(labels.gather(1, torch.stack(order)), clusters)


def call(query, key, value, partition, form, **options):
    merge, sizes, first_order = form
    return attend(
        query, key, value, partition, merge=merge, sizes=sizes, first_order=first_order, **options
    )


def equal_within_clusters(tokens, partition, spread=0.0):
    """Tokens that deviate from their clusters' means by `spread` times what they did."""
    flat = tokens.transpose(1, 2).flatten(2)
    means = partition.unmerge(partition.merge(flat))
    result = means + spread * (flat - means)
    return result.unflatten(2, (H, D)).transpose(1, 2)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_equals_the_slow_twin(form):
    partition = random_partition()
    assert partition.sizes.unique().numel() > 1
    got = call(*heads(), partition, form)
    expected = reference(*heads(), partition.labels, *form)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


def test_queries_with_a_partition_of_their_own():
    partition, queries = random_partition(), random_partition(4, seed=5)
    form = ("two-sided", True, True)
    got = call(*heads(), partition, form, query_partition=queries)
    expected = reference(*heads(), partition.labels, *form, query_labels=queries.labels)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_scale(form):
    query, key, value = heads()
    got = call(query, key, value, random_partition(), form, scale=0.7)
    expected = call(query * 0.7 * D**0.5, key, value, random_partition(), form)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_is_exact_if_no_tokens_are_merged(form):
    query, key, value = heads(dtype=torch.float64)
    partition = Partition(torch.stack([torch.randperm(N) for _ in range(B)]), N)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    got = call(query, key, value, partition, form)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("equal", ["queries", "keys"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_is_exact_where_clusters_are_equal(form, equal):
    query, key, value = heads(dtype=torch.float64)
    partition = random_partition()
    if equal == "queries":
        query = equal_within_clusters(query, partition)
    else:
        key = equal_within_clusters(key, partition)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    error = (call(query, key, value, partition, form) - expected).abs().max()
    merge, sizes, _ = form
    exact = {"queries": ("q", "two-sided"), "keys": ("kv", "two-sided") if sizes else ()}
    assert (error < 1e-12) == (merge in exact[equal])


@pytest.mark.parametrize(
    ("form", "fall"),
    [(("two-sided", True, True), 3.5), (("kv", True, False), 1.5), (("q", False, False), 1.5)],
    ids=str,
)
def test_order_of_the_error(form, fall):
    partition, errors = random_partition(), []
    query, key, value = heads(dtype=torch.float64)
    for spread in (0.2, 0.1):
        q, k = (equal_within_clusters(tokens, partition, spread) for tokens in (query, key))
        exact = torch.nn.functional.scaled_dot_product_attention(q, k, value)
        errors.append((call(q, k, value, partition, form) - exact).norm())
    assert errors[0] / errors[1] > fall
    assert fall > 3 or errors[0] / errors[1] < 3  # the others are of first order


def test_two_sided_is_closer_than_the_forms_it_combines():
    partition = random_partition()
    query, key, value = heads(dtype=torch.float64)
    query, key = (equal_within_clusters(tokens, partition, 0.3) for tokens in (query, key))
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    errors = {
        form: float((call(query, key, value, partition, form) - exact).norm()) for form in FORMS
    }
    assert min(errors, key=errors.get) == ("two-sided", True, True)
    assert errors["kv", True, True] < errors["kv", True, False]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_permuting_the_tokens_permutes_the_output(form):
    partition, order = random_partition(), torch.randperm(N)
    permuted = Partition(partition.labels[:, order], K)
    got = call(*(tokens[:, :, order] for tokens in heads()), permuted, form)
    expected = call(*heads(), partition, form)[:, :, order]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_half_precision_is_within_its_rounding(form, dtype):
    tokens, count = 1024, 128
    query, key, value = (draw(1, 2, tokens, 16, seed=i, dtype=dtype) for i in range(3))
    partition = random_partition(count, tokens=tokens, batch=1)
    got = call(query, key, value, partition, form)
    assert got.dtype == dtype
    expected = call(query.float(), key.float(), value.float(), partition, form)
    error = (got.float() - expected).norm() / value.float().norm()
    assert error < 2 * torch.finfo(dtype).eps


def test_gradients():
    inputs = [tokens[:1, :1, :8].double().requires_grad_() for tokens in heads()]
    partition = random_partition(3, tokens=8, batch=1)
    for form in FORMS:
        assert torch.autograd.gradcheck(
            lambda *qkv, form=form: call(*qkv, partition, form), inputs, fast_mode=True
        )


def test_every_form_is_tested():
    assert {merge for merge, *_ in FORMS} == set(get_args(Merge))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"merge": "both"}, ValueError, "`merge` must be one of qkv, kv, q, two-sided, got 'both'"),
        ({"partition": None}, TypeError, "`partition` must be a Partition, got NoneType"),
        ({"query_partition": 3}, TypeError, "`query_partition` must be a Partition, got int"),
        (
            {"merge": "two-sided", "sizes": False},
            ValueError,
            "`sizes` must be True for merge='two-sided', got False",
        ),
        ({"merge": "q"}, ValueError, "`sizes` must be False for merge='q', got True"),
        (
            {"sizes": False, "first_order": True},
            ValueError,
            "`first_order` must be False, .* got True for merge='kv' and sizes=False",
        ),
        (
            {"merge": "qkv", "first_order": True},
            ValueError,
            "`first_order` must be False, .* got True for merge='qkv' and sizes=True",
        ),
        (
            {"first_order": True, "partition": Partition(EVERY_TOKEN, N, EVERY_TOKEN)},
            ValueError,
            "`first_order` must be False for a partition with representatives",
        ),
        (
            {"query_partition": random_partition()},
            ValueError,
            "`query_partition` must be None, .* got a Partition for merge='kv'",
        ),
        (
            {"partition": random_partition(tokens=8)},
            ValueError,
            r"`partition` must be \[2, 24\], got \[2, 8\]",
        ),
        (
            {"merge": "two-sided", "query_partition": random_partition(batch=1)},
            ValueError,
            r"`query_partition` must be \[2, 24\], got \[1, 24\]",
        ),
        ({"query": draw(B, N, D)}, ValueError, r"`query` must be \[B, H, N, D\], got \[2, 24, 8\]"),
        ({"key": draw(B, 1, N, D)}, ValueError, r"`key` must be \[2, 3, 24, 8\], got \[2, 1, "),
        ({"value": draw(B, H, N, 4)}, ValueError, r"`value` must be .*, got \[2, 3, 24, 4\]"),
        (
            {"key_bias": torch.zeros(B, N)},
            ValueError,
            r"`key_bias` must be \[2, 1, 1, 24\], got \[2, 24\]",
        ),
        (
            {"key_bias": torch.ones(B, 1, 1, N, dtype=torch.bool)},
            ValueError,
            r"`key_bias` must be of a floating-point dtype, got torch\.bool",
        ),
    ],
)
def test_wrong_arguments_are_refused(given, error, message):
    arguments = {
        **dict(zip(("query", "key", "value"), heads(), strict=True)),
        "partition": random_partition(),
        "merge": "kv",
        "sizes": True,
        "first_order": False,
    }
    with pytest.raises(error, match=message):
        attend(**arguments | given)
