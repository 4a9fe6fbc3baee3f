"""Ways to cluster tokens, and the tokens, which the benchmark of clustering compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from sd_tokenmerge import Grid
from sd_tokenmerge.kernels.agglomerative import LINKAGES, agglomerative_labels
from sd_tokenmerge.methods import METHODS, parse_method

KEEP_RATE = 0.5

Row = dict[str, object]


@dataclass(frozen=True)
class Case:
    """Tokens to cluster: `batch` images of `grid` by `grid` tokens."""

    batch: int
    grid: int
    channels: int
    kind: str = "smooth"

    @property
    def clusters(self) -> int:
        """K."""
        return round(self.grid**2 * KEEP_RATE)

    def tokens(self, device: str) -> Tensor:
        """White noise, or a field blurred over 2 tokens as neighbouring features are."""
        random = np.random.default_rng(0)
        shape = (self.batch, self.grid, self.grid, self.channels)
        field = random.standard_normal(shape, dtype=np.float32)
        if self.kind == "smooth":
            field = gaussian_filter(field, (0, 2, 2, 0), mode="nearest")
        return torch.from_numpy(field).flatten(1, 2).to(device)

    def columns(self) -> Row:
        """What a row says about the tokens."""
        return {
            "batch": self.batch,
            "tokens": self.grid**2,
            "channels": self.channels,
            "kind": self.kind,
            "clusters": self.clusters,
        }


@dataclass(frozen=True)
class Contestant:
    """Something that is timed, on so many images."""

    name: str
    run: Callable[[], object]
    images: int
    warms_up: bool = True


def limit(tokens: Tensor) -> None:
    """The nearest other token of every token, by one blocked product and arg-max."""
    for image in torch.nn.functional.normalize(tokens, dim=-1):
        product = image.new_empty(512, len(image))
        for rows in torch.arange(len(image), device=image.device).split(512):
            part = product[: len(rows)]
            torch.mm(image.index_select(0, rows), image.T, out=part)
            part.scatter_(1, rows.unsqueeze(1), -torch.inf)
            part.argmax(1)


def distances(image: Tensor) -> np.ndarray:
    """Cosine distances as the ATC paper's code hands them to scikit-learn, `[N, N]`."""
    unit = torch.nn.functional.normalize(image, dim=-1)
    return (1 - unit @ unit.T).numpy()


def scikit_learn(image: Tensor, num_clusters: int, linkage: str) -> None:
    """As the ATC paper uses it, on a precomputed distance matrix."""
    from sklearn.cluster import AgglomerativeClustering

    clustering = AgglomerativeClustering(num_clusters, metric="precomputed", linkage=linkage)
    clustering.fit_predict(distances(image))


def scipy(image: Tensor, num_clusters: int, linkage: str) -> None:
    """SciPy's hierarchy and cut."""
    from scipy.cluster import hierarchy

    matrix = distances(image)
    tree = hierarchy.linkage(matrix[np.triu_indices(len(matrix), 1)], linkage)
    hierarchy.fcluster(tree, num_clusters, "maxclust")


def fast_cluster(image: Tensor, num_clusters: int, linkage: str) -> None:
    """The hierarchy of fastcluster and the cut of SciPy."""
    import fastcluster
    from scipy.cluster import hierarchy

    matrix = distances(image)
    tree = fastcluster.linkage(matrix[np.triu_indices(len(matrix), 1)], linkage)
    hierarchy.fcluster(tree, num_clusters, "maxclust")


BASELINES = {"scikit-learn": scikit_learn, "SciPy": scipy, "fastcluster": fast_cluster}


def contestants(case: Case, device: str, *, baselines: bool) -> list[Contestant]:
    """The limit, the linkages and, on the CPU, what there was before."""
    tokens, clusters = case.tokens(device), case.clusters
    found = [Contestant("limit", lambda: limit(tokens), case.batch)]
    for linkage in LINKAGES:
        for name, dtype in (("", None), (", float32 search", torch.float32)):
            found.append(
                Contestant(
                    f"sd_tokenmerge {linkage}{name}",
                    lambda link=linkage, d=dtype: agglomerative_labels(tokens, clusters, link, d),
                    case.batch,
                )
            )
        for name, run in BASELINES.items() if baselines and device == "cpu" else ():
            found.append(
                Contestant(
                    f"{name} {linkage}",
                    lambda link=linkage, run=run: run(tokens[0], clusters, link),
                    images=1,
                    warms_up=False,
                )
            )
    return found


def all_methods(case: Case, device: str) -> list[Contestant]:
    """The limit, and every method of the package with its defaults."""
    tokens = case.tokens(device)
    found = [Contestant("limit", lambda: limit(tokens), case.batch)]
    for name in METHODS:
        method = parse_method(name)
        scores = tokens.norm(dim=-1) if method.uses_scores else None
        found.append(
            Contestant(
                name,
                lambda m=method, s=scores: m(
                    tokens, case.clusters, grid=Grid(case.grid, case.grid), scores=s
                ),
                case.batch,
            )
        )
    return found
