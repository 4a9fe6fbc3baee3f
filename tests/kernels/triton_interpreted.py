"""Tests that `test_triton` runs with TRITON_INTERPRET=1; not collected otherwise."""

from __future__ import annotations

import os

import pytest
import torch

from sd_tokenmerge.kernels.agglomerative import agglomerative_labels
from sd_tokenmerge.kernels.device.rounds import labels_by_rounds
from sd_tokenmerge.kernels.device.triton_average import TritonAverageRounds
from sd_tokenmerge.kernels.exact import best_by_id, similarity_block, unit_vectors
from sd_tokenmerge.kernels.segments import segment_sum, sort_by_label
from sd_tokenmerge.kernels.triton_segments import sum_sorted_segments
from tests.kernels.token_fields import smooth_tokens, white_tokens


@pytest.fixture(autouse=True, scope="module")
def _interpreter():
    assert os.environ.get("TRITON_INTERPRET") == "1"


def rounds_of(tokens: torch.Tensor, num_merges: int) -> TritonAverageRounds:
    return TritonAverageRounds(unit_vectors(tokens.flatten(0, 1)).view(tokens.shape), num_merges)


@pytest.mark.parametrize(
    "tokens",
    [
        torch.stack((smooth_tokens(4, 5, 70), white_tokens(20, 70))),
        torch.stack((torch.eye(16, 9), torch.ones(16, 9))),
        torch.cat((torch.zeros(3, 5), white_tokens(4, 5).repeat(3, 1), white_tokens(2, 5)))[None],
        torch.stack((torch.arange(1.0, 25).unsqueeze(1) * white_tokens(1, 9), white_tokens(24, 9))),
    ],
    ids=["smooth and white", "all tied", "partly tied", "equal up to scale and rounding"],
)
@pytest.mark.parametrize("keep", [0.1, 0.6])
def test_the_labels_are_those_of_the_torch_path(tokens, keep):
    num_clusters = max(1, int(tokens.shape[1] * keep))
    expected = agglomerative_labels(tokens, num_clusters, "average")
    rounds = rounds_of(tokens, tokens.shape[1] - num_clusters)
    assert torch.equal(labels_by_rounds(rounds), expected)


def test_nearest_of_listed_rows_among_those_in_play():
    tokens = torch.stack((white_tokens(70, 40), white_tokens(70, 40, seed=1)))
    tokens[1, 30:60] = tokens[1, :30]  # ties
    state = rounds_of(tokens, 35)
    state.size[:, ::7] = 2
    state.total[:, ::7] *= 1.5
    state.mean = (state.total / state.size.unsqueeze(-1)).float()
    state.alive[:, 5::9] = False
    state.dormant[0, 6::11] = True
    state.bound[1] = 0.8
    search = state.alive.clone()
    search[:, 1::3] = False
    former = state.nearest.clone()
    in_play = state.in_play()
    state.find_nearest(search)
    everyone = torch.arange(70)
    for image in range(2):
        mean = state.total[image] / state.size[image].unsqueeze(1)
        similarity = similarity_block(mean, mean)
        similarity[:, ~in_play[image]] = -torch.inf
        expected = best_by_id(similarity, everyone, everyone)
        similarity.fill_diagonal_(-torch.inf)
        best, second = similarity.topk(2, 1).values.unbind(1)
        rows = search[image]
        hopeless = best < 1 - state.bound[image]
        assert ((best - 1 + state.bound[image]).abs() > 2 * state.error).all()
        expected = torch.where(hopeless, everyone, expected)
        assert torch.equal(state.nearest[image][rows], expected[rows])
        assert torch.equal(state.nearest[image][~rows], former[image][~rows])
        torch.testing.assert_close(state.best[image][rows], best[rows], atol=state.error, rtol=0)
        torch.testing.assert_close(state.rest[image][rows], second[rows], atol=state.error, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [3, 200])
def test_segment_sums_are_those_of_the_cpu_to_the_last_bit(dtype, channels):
    tokens = white_tokens(40, channels).to(dtype)
    labels = torch.randint(0, 9, (40,), generator=torch.Generator().manual_seed(0))
    expected = segment_sum(tokens[None], labels[None], 11)[0]
    found = sum_sorted_segments(tokens, *sort_by_label(labels, 11), expected.dtype)
    assert torch.equal(found, expected)
