import pytest
import torch

from sd_tokenmerge.methods import distances, nearest_centers
from sd_tokenmerge.methods.nearest_centers import NearestCenters


def moves(centers, steps, how_many, step_size):
    """Centers, step after step; in each, some of each image's move."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield centers
        centers = centers.clone()
        for of_image in centers:
            some = torch.randperm(len(of_image), generator=generator)[:how_many]
            of_image[some] += step_size * torch.randn(how_many, 3, generator=generator).double()


@pytest.mark.parametrize("num_centers", [1, 2, 30])
@pytest.mark.parametrize("how_many", [0, 1, 5, 30])
@pytest.mark.parametrize("step_size", [0.01, 1])
def test_equal_to_looking_at_all_centers(num_centers, how_many, step_size):
    tokens = torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(0)).double()
    search = NearestCenters(tokens)
    how_many = min(how_many, num_centers)
    for centers in moves(tokens[:, :num_centers].clone(), 8, how_many, step_size):
        distance, index = search.of(centers)
        expected, expected_index = distances.nearest(tokens, centers)
        torch.testing.assert_close(distance, expected)
        assert torch.equal(index, expected_index)


@pytest.mark.parametrize("how_many", [1, 4, 12])
def test_of_equally_near_centers_the_first_wins(how_many):
    # Small integers: every distance is exact, and many are equal.
    tokens = torch.randint(4, (2, 60, 3), generator=torch.Generator().manual_seed(0)).double()
    search = NearestCenters(tokens)
    ties = 0
    for centers in moves(tokens[:, :12].clone(), 20, how_many, 1):
        centers = centers.round()
        all_distances = torch.cdist(tokens, centers).square().round()
        least = all_distances.amin(2, keepdim=True)
        is_least = all_distances == least
        ties += int((is_least.sum(2) > 1).sum())
        distance, index = search.of(centers)
        assert torch.equal(distance, least[..., 0])
        assert torch.equal(index, is_least.int().argmax(2))
    assert ties > 100


def test_there_may_be_more_centers_than_before():
    tokens = torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(0)).double()
    search = NearestCenters(tokens)
    for num_centers in (1, 5, 6, 40):
        centers = tokens[:, :num_centers].clone()
        centers[:, 0] += 1 / num_centers
        distance, index = search.of(centers)
        expected, expected_index = distances.nearest(tokens, centers)
        torch.testing.assert_close(distance, expected)
        assert torch.equal(index, expected_index)


def test_tokens_are_compared_with_centers_that_moved_only(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    tokens = 100 * torch.arange(20.0).repeat(5).unsqueeze(1) + torch.rand(
        100, 1, generator=generator
    )
    compared = []
    two_nearest = nearest_centers._two_nearest

    def counted(tokens, centers):
        compared.append((len(tokens), len(centers)))
        return two_nearest(tokens, centers)

    monkeypatch.setattr(nearest_centers, "_two_nearest", counted)
    search = NearestCenters(tokens[None])
    centers = tokens[None, :20].clone()
    search.of(centers)
    search.of(centers)
    assert compared == [(100, 20)]
    centers = centers.clone()
    centers[0, 3] += 1
    search.of(centers)
    assert compared[1:] == [(100, 1), (0, 20)]
    centers = centers.clone()
    centers[0, 3] += 249  # the five tokens it had are nearer to others now
    search.of(centers)
    assert compared[3:] == [(100, 1), (5, 20)]
