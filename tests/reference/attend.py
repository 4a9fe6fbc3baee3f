"""The forms of merged attention (`docs/forms.md`) the obvious way: float64, head by head."""

from __future__ import annotations

import torch


def attend(
    query, key, value, labels, merge, sizes, first_order, query_labels=None, representatives=None
):
    """Merged attention, `[B, H, N, D] -> [B, H, N, D]`; `representatives` replace means."""
    output = torch.empty_like(value, dtype=torch.float64)
    for image in range(query.shape[0]):
        clusters = members(labels[image])
        query_clusters = clusters if query_labels is None else members(query_labels[image])
        chosen = None if representatives is None else representatives[image]
        for head in range(query.shape[1]):
            q, k, v = (tensor[image, head].double() for tensor in (query, key, value))
            output[image, head] = attend_head(
                q, k, v, clusters, query_clusters, merge, sizes, first_order, chosen
            )
    return output


def attend_head(q, k, v, clusters, query_clusters, merge, sizes, first_order, representatives):
    root = q.shape[1] ** 0.5
    weights = torch.tensor([len(c) if sizes else 1 for c in clusters], dtype=torch.float64)
    merged_k = merged(k, clusters, representatives)
    merged_v = merged(v, clusters, representatives)
    correction = torch.zeros(k.shape[1], v.shape[1], dtype=torch.float64)
    if first_order:
        for cluster, mean in zip(clusters, merged_k, strict=True):
            for j in cluster:
                correction += torch.outer(k[j] - mean, v[j]) / len(k)

    def exact(queries):
        return (queries @ k.T / root).softmax(-1) @ v

    def approximate(queries):
        shares = (queries @ merged_k.T / root).exp() * weights
        shares = shares / shares.sum(-1, keepdim=True)
        return shares @ merged_v + queries @ correction / root

    if merge == "qkv":
        return unmerged(approximate(merged(q, clusters, representatives)), clusters)
    if merge == "q":
        return unmerged(exact(merged(q, clusters, representatives)), clusters)
    if merge == "kv":
        return approximate(q)
    merged_q = merged(q, query_clusters, representatives)
    return approximate(q) + unmerged(exact(merged_q) - approximate(merged_q), query_clusters)


def members(labels):
    return [torch.nonzero(labels == k).flatten() for k in range(int(labels.max()) + 1)]


def merged(tokens, clusters, representatives):
    if representatives is not None:
        return tokens[representatives]
    return torch.stack([tokens[cluster].mean(0) for cluster in clusters])


def unmerged(outputs, clusters):
    result = torch.empty(sum(map(len, clusters)), outputs.shape[1], dtype=torch.float64)
    for output, cluster in zip(outputs, clusters, strict=True):
        result[cluster] = output
    return result
