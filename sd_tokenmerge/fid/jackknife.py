"""Standard errors of distances: the delete-group jackknife with Efron and Stein's correction.

The bootstrap is not valid for the Fréchet distance: images drawn twice lower the covariance's rank,
which in a simulation put the bootstrap's mean 11 above the value and doubled its spread. Deleting
one group of images at a time keeps them distinct.

The jackknife gives the variance of a statistic that is a sum over images, and twice the variance of
one that is a sum over pairs of images (Efron & Stein, The jackknife estimate of variance, Annals of
Statistics 9, 1981). A distance far above its floor is nearly the former; that of a perfect
generator, which is at its minimum, is about half the latter. The contribution of pairs shows in
second differences, for which neighbouring groups are deleted two at a time, and is subtracted once.

The error is that of drawing other generated images; the reference set is taken as given.
`docs/fid.md` has simulations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import torch
from torch import Tensor

from sd_tokenmerge.fid.distance import Gaussian, require_features

NUM_GROUPS = 20


@dataclass(frozen=True, eq=False)
class Groups:
    """A division of N images into G groups, to be deleted one and two at a time.

    Attributes:
        labels: `[N]` int64 in [0, G).
        num_groups: G, at least 3.
        by_class: whether the images of a class stay together.
    """

    labels: Tensor
    num_groups: int
    by_class: bool

    @property
    def sizes(self) -> Tensor:
        """`[G]` int64: images per group."""
        return self.labels.bincount(minlength=self.num_groups)

    @property
    def deleted(self) -> Tensor:
        """`[2G, G]` bool, groups deleted per replicate: each g, then each g with g + 1 (mod G)."""
        single = torch.eye(self.num_groups, dtype=torch.bool)
        return torch.cat([single, single | single.roll(1, dims=1)])

    def __str__(self) -> str:
        if self.by_class:
            return f"{self.num_groups} groups of classes"
        return f"{self.num_groups} groups of images"


def class_of(file: str) -> str:
    """The class of a file: its folder, or the part of its name before the last underscore.

    Examples: `n01440764/x.JPEG` is of `n01440764`, `17_0.png` of `17`.
    """
    path = PurePosixPath(file)
    if len(path.parts) > 1:
        return path.parent.as_posix()
    head, _, _ = path.stem.rpartition("_")
    return head or path.stem


def make_groups(files: Sequence[str], num_groups: int = NUM_GROUPS) -> Groups | None:
    """Divide images into groups for the jackknife.

    With at least two classes per group, whole classes are dealt out to the groups in turn: images
    of one class are alike, and deleting single ones would understate the error. With fewer
    classes, the images of each class are dealt out, so that every group resembles the whole set.

    Args:
        files: N paths relative to the set's folder.
        num_groups: G.

    Returns:
        The groups, or None if there are fewer than 2G images: too few for an error estimate.
    """
    if len(files) < 2 * num_groups:
        return None
    classes = [class_of(file) for file in files]
    distinct = sorted(set(classes), key=_natural)
    labels = torch.empty(len(files), dtype=torch.int64)
    by_class = len(distinct) >= 2 * num_groups
    if by_class:
        group_of = {name: index % num_groups for index, name in enumerate(distinct)}
        labels[:] = torch.tensor([group_of[name] for name in classes])
    else:
        rank = {name: index for index, name in enumerate(distinct)}
        order = sorted(range(len(files)), key=lambda i: (rank[classes[i]], files[i]))
        labels[torch.tensor(order)] = torch.arange(len(files)) % num_groups
    return Groups(labels, num_groups, by_class)


def _natural(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def jackknife_error(value: float, replicates: Tensor, groups: Groups) -> float:
    """Standard error of a value from replicates with one and two groups deleted each.

    Groups may differ by a few images, and a distance falls with the number of images. Therefore the
    pseudo-values are those for groups of unequal size (Busing, Meijer & van der Leeden, Statistics
    and Computing 9, 1999); a bias proportional to 1/N cancels in them and in the second
    differences.

    Accuracy for independent groups: the variance of a sum over images is unbiased. That of a sum
    over pairs (KID, or any U- or V-statistic of degree two) is unbiased but for terms of order
    1/G^2, unless the floor applies: the corrected variance is at least half the uncorrected one,
    which makes the error of a pure sum over pairs 10 % too large at G = 20. The error of
    other statistics, such as the Fréchet distance, is as accurate as two such terms describe them.

    Args:
        value: the statistic of all images.
        replicates: `[2G]`, in the order of `Groups.deleted`; `[G]` for no correction.
        groups: division of the N images.
    """
    replicates = replicates.to(torch.float64)
    single, double = replicates[: groups.num_groups], replicates[groups.num_groups :]
    share = groups.sizes.to(torch.float64) / groups.labels.shape[0]
    pseudo_values = (value - (1 - share) * single) / share
    mean = (share * pseudo_values).sum()
    variance = ((pseudo_values - mean).square() * share / (1 - share)).mean()
    if len(double):
        variance = torch.maximum(variance - _excess(value, single, double, share), variance / 2)
    return float(variance.sqrt())


def _excess(value: float, single: Tensor, double: Tensor, share: Tensor) -> Tensor:
    """By how much the jackknife's variance overstates the contribution of pairs.

    In `Q = G s - (G - 1) (s_g + s_h) + (G - 2) s_gh` (for groups of equal size), sums over images
    cancel, and sums over pairs reduce to the pairs between g and h. Half the variance of Q is the
    excess (Efron & Stein 1981).
    """
    following = share.roll(-1)
    differences = len(share) * (
        value
        - (1 - share) * single
        - (1 - following) * single.roll(-1)
        + (1 - share - following) * double
    )
    return differences.var(correction=0) / 2


def frechet_replicates(features: Tensor, reference: Gaussian, groups: Groups) -> Tensor:
    """Fréchet distances to the reference with groups of images deleted, for `jackknife_error`.

    Products with the reference's factor are computed once for all replicates. Nuclear norms come
    from the eigenvalues of a Gram matrix: faster than singular values, and within 1e-8 relative,
    far below the error to be estimated.

    Args:
        features: `[N, D]`, any float dtype.
        reference: normal distribution of the reference set.
        groups: division of the N images; at least two images remain in each replicate.

    Returns:
        `[2G]` float64, in the order of `Groups.deleted`.

    Raises:
        ValueError: as `require_features`.
    """
    require_features(features)
    features = features.to(torch.float64)
    centre = features.mean(0)
    centred = features - centre
    projected = centred @ reference.factor.T  # [N, R]
    by_images = projected.shape[0] <= projected.shape[1]
    gram = projected @ projected.T if by_images else projected.T @ projected
    squares = centred.square().sum(1)
    values = []
    for kept in ~groups.deleted[:, groups.labels]:
        count = int(kept.sum())
        shift = centred[kept].mean(0)
        trace = float(squares[kept].sum() - count * shift.square().sum()) / (count - 1)
        if by_images:
            block = gram[kept][:, kept]
            rows = block.mean(0)
            block = block - rows[None, :] - rows[:, None] + rows.mean()
        else:
            deleted = projected[~kept]
            total = projected[kept].sum(0)
            block = gram - deleted.T @ deleted - torch.outer(total, total) / count
        eigenvalues = torch.linalg.eigvalsh(block / (count - 1))
        nuclear_norm = float(eigenvalues.clamp_min(0).sqrt().sum())
        offset = float((centre + shift - reference.mean).square().sum())
        values.append(offset + trace + reference.trace - 2 * nuclear_norm)
    return torch.tensor(values, dtype=torch.float64)
