"""Bipartite soft matching, shared by ToMe and ToMe-SD (Bolya et al., ICLR 2023, section 3).

1. Split the tokens into sources (A) and destinations (B).
2. Draw one edge from each source to its most similar destination.
3. Keep the r = N - K most similar edges.
4. Merge the tokens that are connected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.methods.distances import most_similar, unit_tokens
from sd_tokenmerge.methods.numbering import labels_from_roots


def match_bipartite(
    tokens: Tensor, sources: Tensor, destinations: Tensor, num_clusters: int
) -> Tensor:
    """Merge the N - K sources most similar to a destination, `[B, N, C] -> [B, N]`.

    Args:
        tokens: `[B, N, C]` features, compared by cosine similarity.
        sources: `[S]` int64 token indices, S >= N - K; the first of equally similar sources is
            merged first.
        destinations: `[N - S]` int64 indices of the other tokens; the first wins a tie.
        num_clusters: K.

    Returns:
        `[B, N]` int64 labels.
    """
    batch, count, _ = tokens.shape
    roots = torch.arange(count, device=tokens.device).repeat(batch, 1)
    similarity, match = most_similar(
        unit_tokens(tokens[:, sources]), unit_tokens(tokens[:, destinations])
    )
    edges = similarity.argsort(dim=1, descending=True, stable=True)[:, : count - num_clusters]
    roots.scatter_(1, sources[edges], destinations[match.gather(1, edges)])
    return labels_from_roots(roots)
