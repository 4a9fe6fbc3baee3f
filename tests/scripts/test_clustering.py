"""The benchmark of clustering: its contestants cluster, its arithmetic, and the tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from benchmarks import clustering
from benchmarks.rows import append_rows
from benchmarks.tokens import BASELINES, Tokens, limit

from sd_tokenmerge import METHODS
from sd_tokenmerge.bench.turns import Cost, Timings


@pytest.mark.parametrize("kind", ["smooth", "white"])
def test_tokens_are_the_same_in_every_run(kind):
    field = Tokens(2, 6, 5, kind)
    assert field.draw("cpu").shape == (2, 36, 5)
    assert torch.equal(field.draw("cpu"), field.draw("cpu"))
    assert field.clusters == 18


def test_smooth_tokens_are_like_their_neighbours():
    smooth, white = (Tokens(1, 16, 8, kind).draw("cpu")[0] for kind in ("smooth", "white"))
    likeness = [torch.cosine_similarity(x[:-1], x[1:]).mean() for x in (smooth, white)]
    assert likeness[0] > 0.5 > abs(likeness[1])


def test_the_limit_finds_nearest_neighbours(monkeypatch):
    tokens, found, argmax = Tokens(1, 6, 5).draw("cpu"), [], torch.Tensor.argmax
    monkeypatch.setattr(torch.Tensor, "argmax", lambda *a: found.append(argmax(*a)) or found[-1])
    limit(tokens)
    unit = torch.nn.functional.normalize(tokens[0], dim=-1)
    expected = argmax((unit @ unit.T).fill_diagonal_(-torch.inf), 1)
    assert torch.equal(torch.cat(found), expected)


@pytest.mark.parametrize("library", BASELINES)
def test_other_libraries_stop_at_the_clusters_that_are_asked_for(library):
    pytest.importorskip("fastcluster" if library == "fastcluster" else "sklearn")
    image = Tokens(1, 6, 5, "white").draw("cpu")[0]
    assert len(np.unique(BASELINES[library](image, 18, "average"))) == 18


@pytest.mark.parametrize(
    ("benchmark", "contestants"),
    [
        ("small", ["limit", *map(clustering.method_of, clustering.LINKAGES)]),
        ("methods", ["limit", *METHODS]),
    ],
)
def test_everyone_takes_part(benchmark, contestants):
    rows = clustering.compare(benchmark, Tokens(2, 6, 8), "cpu", 0, 1)
    assert [row["contestant"] for row in rows] == contestants
    assert all(float(row["ms_per_image"]) > 0 for row in rows)


def test_times_are_per_image_and_related_to_the_limit(monkeypatch):
    def turns(reference, others, **_):
        base = [Cost(2.0, 0.0)] * 3
        ours = clustering.method_of("single")
        seconds = {"limit": 2.0, ours: 12.0, "SciPy single": 6.0}
        return {name: Timings([Cost(s, 0.0)] * 3, base) for name, s in seconds.items()}

    monkeypatch.setattr(clustering, "take_turns", turns)
    rows = clustering.compare("speed", Tokens(2, 4, 3), "cpu", 0, 1)
    assert [(row["ms_per_image"], row["times_limit"]) for row in rows] == [
        ("1e+03", "1.00"),
        ("6e+03", "6.00"),
        ("6e+03", "6.00"),  # of one image
    ]


def test_memory_of_one_size_is_measured():
    row = clustering.growth("atc:linkage=complete", Tokens(1, 24, 8), "cpu")
    assert (row["tokens"], row["repeats"]) == ("576", "5")
    assert int(row["peak_mib"]) >= 1


def test_tables(tmp_path):
    row = dict.fromkeys(clustering.COLUMNS, "2") | {"benchmark": "speed", "device": "a CPU"}
    times = {"limit": "10", "SciPy average": "30"}
    times |= dict.fromkeys(map(clustering.method_of, clustering.LINKAGES), "12")
    rows = [{**row, "contestant": name, "ms_per_image": ms} for name, ms in times.items()]
    rows += [{**rows[0], "benchmark": "methods"}, {**rows[2], "benchmark": "methods"}]
    append_rows(tmp_path / "clustering.csv", clustering.COLUMNS, rows)
    text = clustering.clustering_times(tmp_path)
    assert "| 2 x 2 x 2 2 | average | 12 (2 to 2) | 2x | - | 2.5x | - |" in text
    assert "| 2 x 2 x 2 2 | single | 12 (2 to 2) | 2x | - | - | - |" in text
    assert "**On a GPU**: not run." in text
    assert "`atc:linkage=average` 12; one exact nearest-neighbour\nsearch: 10" in clustering.costs(
        tmp_path
    )
