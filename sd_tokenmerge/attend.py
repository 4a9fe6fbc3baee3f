"""The forms of merged attention, on query, key and value. Knows no models.

Notation of one head, as in `docs/forms.md`: query q, keys k_j and values v_j of N tokens with D
channels; clusters c of n_c tokens, with means k_c and v_c; a(q) is exact attention,

    a(q) = sum_j exp(q.k_j / sqrt(D)) v_j / sum_j exp(q.k_j / sqrt(D)),

and m(q) attention to the clusters, each weighted by its size,

    m(q) = sum_c n_c exp(q.k_c / sqrt(D)) v_c / sum_c n_c exp(q.k_c / sqrt(D)) + q.H / sqrt(D).

H is the first-order term: the sum over all keys of the first-order Taylor expansions of their
exponentials around k_c, pooled over the clusters (PISA, arXiv 2602.01077).
"""

from __future__ import annotations

from typing import get_args

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sd_tokenmerge.config import Merge
from sd_tokenmerge.partitions import Partition


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partition: Partition,
    *,
    merge: Merge,
    sizes: bool,
    first_order: bool,
    query_partition: Partition | None = None,
    scale: float | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Merged attention, `[B, H, N, D] -> [B, H, N, D]`.

    No intermediate result has N x K elements, apart from what the fused kernel of
    `scaled_dot_product_attention` holds.

    Args:
        query: `[B, H, N, D]`, after normalisation and rotary embedding.
        key: like `query`.
        value: like `query`.
        partition: the clusters of the N tokens; all heads share them.
        merge: `"qkv"`: attention among clusters; each token gets its cluster's output (the papers).
            `"kv"`: m(q). `"q"`: a(q_c), with q_c the mean query of the token's cluster.
            `"two-sided"`: m(q) + [a(q_c) - m(q_c)], a control variate; exact where the keys or the
            queries of each cluster are equal, with an error of second order in their spreads.
        sizes: whether merged keys are weighted by their numbers of tokens, n_c (ToMe,
            "proportional attention"); otherwise by 1. Must be True for `"two-sided"`, and False
            for `"q"`, which merges no keys.
        first_order: whether m has the first-order term, which only `"kv"` and `"two-sided"` may
            have. Needs `sizes` and a partition without representatives.
        query_partition: the clusters of the queries for `"two-sided"`; None: `partition`. Must be
            None for other forms.
        scale: factor on the products of queries and keys; None: `1 / sqrt(D)`.
        key_bias: added to the logits of each key, `[B, 1, 1, N]` of a floating-point dtype; equal
            for all tokens of a cluster, such as -inf for padding in clusters of its own.

    Raises:
        TypeError: `partition` or `query_partition` is not a `Partition`.
        ValueError: `merge` is unknown, another option does not suit it, or a tensor has the wrong
            shape.
    """
    _require_form(merge, sizes, first_order, partition, query_partition)
    _require_shapes(query, key, value, partition, query_partition, key_bias)
    if merge == "q":
        output = scaled_dot_product_attention(
            _merge(partition, query), key, value, attn_mask=key_bias, scale=scale
        )
        return _unmerge(partition, output)

    bias = partition.log_sizes(query.dtype)[:, None, None] if sizes else None
    if key_bias is not None:
        of_clusters = _merge(partition, key_bias.transpose(-1, -2)).transpose(-1, -2)
        bias = of_clusters if bias is None else bias + of_clusters

    keys, values = _merge(partition, key), _merge(partition, value)
    slope = None
    if first_order:
        slope = _slope(key - _unmerge(partition, keys), value, scale, key_bias)

    def attend_to_clusters(queries: Tensor) -> Tensor:
        output = scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale)
        return output if slope is None else output + queries @ slope

    if merge == "qkv":
        return _unmerge(partition, attend_to_clusters(_merge(partition, query)))
    output = attend_to_clusters(query)
    if merge == "kv":
        return output
    query_partition = query_partition or partition
    queries = _merge(query_partition, query)
    exact = scaled_dot_product_attention(queries, key, value, attn_mask=key_bias, scale=scale)
    return output + _unmerge(query_partition, exact - attend_to_clusters(queries))


def _require_form(
    merge: str,
    sizes: bool,
    first_order: bool,
    partition: Partition,
    query_partition: Partition | None,
) -> None:
    if merge not in get_args(Merge):
        raise ValueError(f"`merge` must be one of {', '.join(get_args(Merge))}, got {merge!r}.")
    for name, given in (("partition", partition), ("query_partition", query_partition)):
        if not isinstance(given, Partition) and (given is not None or name == "partition"):
            raise TypeError(f"`{name}` must be a Partition, got {type(given).__name__}.")
    needed = {"two-sided": True, "q": False}.get(merge, sizes)
    if sizes != needed:
        raise ValueError(f"`sizes` must be {needed} for merge={merge!r}, got {sizes}.")
    if first_order and not (merge in ("kv", "two-sided") and sizes):
        raise ValueError(
            "`first_order` must be False, except for merge='kv' and 'two-sided' with `sizes`, got "
            f"True for merge={merge!r} and sizes={sizes}."
        )
    if first_order and partition.representatives is not None:
        raise ValueError(
            "`first_order` must be False for a partition with representatives, got True."
        )
    if query_partition is not None and merge != "two-sided":
        raise ValueError(
            "`query_partition` must be None, except for merge='two-sided', got a Partition for "
            f"merge={merge!r}."
        )


def _require_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partition: Partition,
    query_partition: Partition | None,
    key_bias: Tensor | None,
) -> None:
    if query.ndim != 4:
        raise ValueError(f"`query` must be [B, H, N, D], got {list(query.shape)}.")
    batch, _, length, _ = query.shape
    query_labels = None if query_partition is None else query_partition.labels
    for name, tensor, expected in (
        ("key", key, query.shape),
        ("value", value, query.shape),
        ("partition", partition.labels, (batch, length)),
        ("query_partition", query_labels, (batch, length)),
        ("key_bias", key_bias, (batch, 1, 1, length)),
    ):
        if tensor is not None and tensor.shape != expected:
            raise ValueError(f"`{name}` must be {list(expected)}, got {list(tensor.shape)}.")
    if key_bias is not None and not key_bias.is_floating_point():
        raise ValueError(f"`key_bias` must be of a floating-point dtype, got {key_bias.dtype}.")


def _slope(
    deviations: Tensor, value: Tensor, scale: float | None, key_bias: Tensor | None
) -> Tensor:
    """H times the scale, `[B, H, D, D]`, from the keys' deviations from their clusters' means.

    H is a mean over the keys; with a bias, each counts as often as its exponential says.
    """
    num_tokens, channels = deviations.shape[-2:]
    # on both factors, so that neither overflows nor underflows in half precision
    root: float | Tensor = num_tokens**-0.5
    if key_bias is not None:
        root = key_bias.softmax(-1).sqrt().transpose(-1, -2)
    slope: Tensor = (deviations * root).transpose(-1, -2) @ (value * root)
    return slope * (channels**-0.5 if scale is None else scale)


def _merge(partition: Partition, heads: Tensor) -> Tensor:
    """`Partition.merge` of all heads together, `[B, H, N, D] -> [B, H, K, D]`."""
    tokens = partition.merge(heads.transpose(1, 2).flatten(2))
    return tokens.view(*tokens.shape[:2], -1, heads.shape[-1]).transpose(1, 2)


def _unmerge(partition: Partition, heads: Tensor) -> Tensor:
    """`Partition.unmerge` of all heads together, `[B, H, K, D] -> [B, H, N, D]`."""
    tokens = partition.unmerge(heads.transpose(1, 2).flatten(2))
    return tokens.view(*tokens.shape[:2], -1, heads.shape[-1]).transpose(1, 2)
