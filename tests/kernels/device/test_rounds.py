"""The parts that rounds of fixed shape are made of."""

from __future__ import annotations

import torch

from sd_tokenmerge.kernels.device import rounds, search
from sd_tokenmerge.kernels.device.single import _join
from sd_tokenmerge.kernels.exact import similarity_block, unit_vectors
from tests.kernels.token_fields import white_tokens


def test_listed_tokens_come_first_and_ascend():
    flags = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    listed, count = rounds.list_tokens(flags)
    assert count.tolist() == [[3], [0], [5]]
    assert listed.tolist() == [[1, 2, 4, 0, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_blocks_cover_all_rows_once(monkeypatch):
    monkeypatch.setattr(rounds, "_BLOCK_NUMBERS", 30)
    for per_row in (1, 7, 10, 100):
        blocks = list(rounds.row_blocks(17, per_row))
        assert [row for block in blocks for row in range(17)[block]] == list(range(17))
        assert all((block.stop - block.start - 1) * per_row < 30 for block in blocks)


def test_roots_and_their_numbers():
    parent = torch.tensor([[0, 0, 1, 2, 3, 4, 6, 6, 5], [0, 1, 2, 2, 1, 5, 5, 6, 0]])
    root = rounds.follow(parent)
    assert root.tolist() == [[0, 0, 0, 0, 0, 0, 6, 6, 0], [0, 1, 2, 2, 1, 5, 5, 5, 0]]
    assert rounds.number_by_first(root).tolist() == [
        [0, 0, 0, 0, 0, 0, 1, 1, 0],
        [0, 1, 2, 2, 1, 3, 3, 3, 0],
    ]


def test_the_few_most_similar_and_a_bound_on_the_others(monkeypatch):
    unit = unit_vectors(white_tokens(2 * 40, 6)).view(2, 40, 6)
    unit[1, 20:] = unit[1, :20]  # ties
    group = (torch.arange(40) // 3).repeat(2, 1)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[0, ::5] = False
    valid[1, 3:] = False  # at most three, of which some are of the own group
    monkeypatch.setattr(search, "_LISTED", 4)
    few = search.most_similar(unit, group, valid)
    for image in range(2):
        exact = similarity_block(unit[image], unit[image])
        exact.masked_fill_(group[image].unsqueeze(1) == group[image], -torch.inf)
        exact.masked_fill_(~valid[image], -torch.inf)
        found, place = few.similarity[image], few.place[image]
        there = found > -torch.inf
        assert torch.equal(found[there], exact.gather(1, place)[there])
        assert torch.equal(there.sum(1), (exact > -torch.inf).sum(1).clamp(max=4))
        assert torch.equal(found.amax(1), exact.amax(1))
        row, nth = torch.where(there)
        others = exact.index_put((row, place[row, nth]), torch.tensor(-torch.inf).double())
        assert (others.amax(1) <= few.rest[image]).all()
        assert (few.rest[image] <= found.amin(1).clamp(min=-1) + 1e-5)[there.all(1)].all()


def test_components_join_along_their_edges():
    # 0-2 have each other, 4 goes to 2, 5 to 4, 7 has no edge; 1, 3 and 6 are no names
    component = torch.tensor([[0, 0, 2, 2, 4, 5, 5, 7]])
    has_edge = torch.tensor([[1, 0, 1, 0, 1, 1, 0, 0]]).bool()
    left = torch.tensor([[0, 0, 0, 0, 2, 5, 0, 0]])
    right = torch.tensor([[2, 0, 2, 0, 4, 4, 0, 0]])
    joined, ended = _join(component, has_edge, left, right)
    assert joined.tolist() == [[0, 0, 0, 0, 0, 0, 0, 7]]
    assert ended.nonzero()[:, 1].tolist() == [2, 4, 5]
