"""Tokens to cluster, the lower bound of searching them, and other libraries' clustering.

Imports nothing from sd_tokenmerge, so that it works with any commit of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn.functional import normalize

KEEP_RATE = 0.5


@dataclass(frozen=True)
class Tokens:
    """`batch` images of `grid` x `grid` tokens.

    Attributes:
        batch: images.
        grid: tokens along a side.
        channels: of each token.
        kind: `"white"` noise, or `"smooth"`: blurred over two tokens, so neighbours are similar.
    """

    batch: int
    grid: int
    channels: int
    kind: str = "smooth"

    @property
    def clusters(self) -> int:
        """K: half of the tokens."""
        return round(self.grid**2 * KEEP_RATE)

    def draw(self, device: str) -> Tensor:
        """The tokens, `[batch, grid**2, channels]` float32; the same in every call."""
        random = np.random.default_rng(0)
        shape = (self.batch, self.grid, self.grid, self.channels)
        field = random.standard_normal(shape, dtype=np.float32)
        if self.kind == "smooth":
            field = gaussian_filter(field, (0, 2, 2, 0), mode="nearest")
        return torch.from_numpy(field).flatten(1, 2).to(device)

    def columns(self) -> dict[str, str]:
        """The columns that describe the tokens."""
        return {
            "batch": str(self.batch),
            "tokens": str(self.grid**2),
            "channels": str(self.channels),
            "kind": self.kind,
            "clusters": str(self.clusters),
        }


def limit(tokens: Tensor) -> None:
    """The nearest other token of every token, by one blocked product and arg-max."""
    for image in normalize(tokens, dim=-1):
        product = image.new_empty(512, len(image))
        for rows in torch.arange(len(image), device=image.device).split(512):
            part = product[: len(rows)]
            torch.mm(image.index_select(0, rows), image.T, out=part)
            part.scatter_(1, rows.unsqueeze(1), -torch.inf)
            part.argmax(1)


def distances(image: Tensor) -> NDArray[np.float32]:
    """Cosine distances as the ATC paper's code hands them to scikit-learn, `[N, N]`."""
    unit = normalize(image, dim=-1)
    return (1 - unit @ unit.T).numpy()


def scikit_learn(image: Tensor, num_clusters: int, linkage: str) -> NDArray[np.int64]:
    """Labels by scikit-learn on a precomputed distance matrix, as in the ATC paper's code."""
    from sklearn.cluster import AgglomerativeClustering

    clustering = AgglomerativeClustering(num_clusters, metric="precomputed", linkage=linkage)
    return clustering.fit_predict(distances(image))


def scipy(image: Tensor, num_clusters: int, linkage: str) -> NDArray[np.int64]:
    """Labels by SciPy's hierarchy and cut."""
    from scipy.cluster import hierarchy

    matrix = distances(image)
    tree = hierarchy.linkage(matrix[np.triu_indices(len(matrix), 1)], linkage)
    return hierarchy.fcluster(tree, num_clusters, "maxclust")


def fast_cluster(image: Tensor, num_clusters: int, linkage: str) -> NDArray[np.int64]:
    """Labels by fastcluster's hierarchy and SciPy's cut."""
    import fastcluster
    from scipy.cluster import hierarchy

    matrix = distances(image)
    tree = fastcluster.linkage(matrix[np.triu_indices(len(matrix), 1)], linkage)
    return hierarchy.fcluster(tree, num_clusters, "maxclust")


BASELINES = {"scikit-learn": scikit_learn, "SciPy": scipy, "fastcluster": fast_cluster}
