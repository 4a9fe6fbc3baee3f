"""The benchmark of clustering: its contestants cluster, and its arithmetic."""

from __future__ import annotations

import argparse

import bench_clustering
import clustering_contestants
import numpy as np
import pytest
import torch
from bench_clustering import FIELDS, compare, measure
from bench_rows import MACHINE_FIELDS
from clustering_contestants import Case, Contestant, all_methods, contestants, limit

from sd_tokenmerge import METHODS


@pytest.mark.parametrize("kind", ["smooth", "white"])
def test_tokens_are_the_same_in_every_run(kind):
    case = Case(2, 6, 5, kind)
    assert case.tokens("cpu").shape == (2, 36, 5)
    assert torch.equal(case.tokens("cpu"), case.tokens("cpu"))
    assert case.clusters == 18


def test_smooth_tokens_are_like_their_neighbours():
    smooth, white = (Case(1, 16, 8, kind).tokens("cpu")[0] for kind in ("smooth", "white"))
    likeness = [torch.cosine_similarity(x[:-1], x[1:]).mean() for x in (smooth, white)]
    assert likeness[0] > 0.5 > abs(likeness[1])


def test_the_limit_finds_nearest_neighbours(monkeypatch):
    tokens = Case(1, 6, 5).tokens("cpu")
    found = []
    argmax = torch.Tensor.argmax
    monkeypatch.setattr(torch.Tensor, "argmax", lambda *a: found.append(argmax(*a)) or found[-1])
    limit(tokens)
    unit = torch.nn.functional.normalize(tokens[0], dim=-1)
    expected = argmax((unit @ unit.T).fill_diagonal_(-torch.inf), 1)
    assert torch.equal(torch.cat(found), expected)


@pytest.mark.parametrize("name", clustering_contestants.BASELINES)
def test_baselines_stop_at_the_clusters_that_are_asked_for(name, monkeypatch):
    pytest.importorskip("fastcluster" if name == "fastcluster" else "sklearn")
    from scipy.cluster import hierarchy
    from sklearn.cluster import AgglomerativeClustering

    found = []
    cut, fit = hierarchy.fcluster, AgglomerativeClustering.fit_predict
    monkeypatch.setattr(hierarchy, "fcluster", lambda *a: found.append(cut(*a)))
    monkeypatch.setattr(AgglomerativeClustering, "fit_predict", lambda *a: found.append(fit(*a)))
    image = Case(1, 6, 5, "white").tokens("cpu")[0]
    clustering_contestants.BASELINES[name](image, 18, "average")
    assert [len(np.unique(labels)) for labels in found] == [18]


def test_everyone_takes_part():
    names = [one.name for one in contestants(Case(1, 4, 3), "cpu", baselines=True)]
    assert len(names) == len(set(names)) == 1 + 3 * (2 + 3)
    assert [one.name for one in all_methods(Case(1, 4, 3), "cpu")] == ["limit", *METHODS]


def test_times_are_per_image_and_related_to_the_limit(monkeypatch):
    seconds = {"limit": 2.0, "slow": 12.0}
    monkeypatch.setattr(bench_clustering, "timed", lambda run: seconds[run()])
    entered = [Contestant("limit", lambda: "limit", 2), Contestant("slow", lambda: "slow", 4)]
    rows = compare("speed", Case(2, 4, 3), entered, 0.0)
    assert [(row["ms_per_image"], row["times_limit"]) for row in rows] == [
        ("1e+03", "1.00"),
        ("3e+03", "3.00"),
    ]
    assert {row["repeats"] for row in rows} == {3}


def test_tiny_inputs(capsys):
    arguments = argparse.Namespace(
        quick=True, device="cpu", minutes=0.0, only=["small", "methods"], threads=1
    )
    rows = [row for rows in measure(arguments) for row in rows]
    assert {row["benchmark"] for row in rows} == {"small", "methods"}
    assert all({*row, *MACHINE_FIELDS, "peak_mib"} == set(FIELDS) for row in rows)
    assert all(float(row["ms_per_image"]) > 0 for row in rows)
