"""No method but ATC, whose kernel is tested with it, holds all distances at a time."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sd_tokenmerge.methods import Grid, distances
from tests.methods.variants import VARIANTS, random_tokens, run


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.itemsize)
        return result


@pytest.mark.parametrize("method", [m for m in VARIANTS if m.name != "atc"], ids=str)
def test_distances_are_held_in_blocks(method, monkeypatch):
    grid, batch, channels = Grid(20, 30), 2, 4
    monkeypatch.setattr(distances, "BLOCK_SIZE", 2000)
    with LargestTensor() as largest:
        run(method, random_tokens(batch, grid, channels), 310, grid)
    # the features of the whole batch; all distances would be 360,000 elements
    assert 0 < largest.elements <= batch * grid.num_tokens * channels
