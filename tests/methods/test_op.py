"""Clustering inside compiled models: one opaque operator, the same result."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from sd_tokenmerge.methods import ATC, Grid, KMedoids, Method, RandomClusters, ToMe
from sd_tokenmerge.methods.op import cluster
from sd_tokenmerge.partitions import Partition
from tests.methods.variants import VARIANTS, random_tokens

GRID = Grid(4, 6)


class Merger(torch.nn.Module):
    """What a patched attention does, without the attention."""

    def __init__(self, method, num_clusters=15):
        super().__init__()
        self.method = method
        self.num_clusters = num_clusters

    def forward(self, tokens, seed=0, scores=None):
        found = cluster(self.method, tokens * 2, self.num_clusters, GRID, seed, scores)
        return found.unmerge(found.merge(tokens).tanh())


def scores_for(method, tokens):
    return tokens.detach().norm(dim=-1) if method.uses_scores else None


def compiled(module, backend="eager"):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(module, fullgraph=True, backend=backend)


def num_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("method", VARIANTS, ids=str)
def test_every_method_compiles_to_the_same_result(method):
    module, tokens = Merger(method), random_tokens(2, GRID)
    scores = scores_for(method, tokens)
    expected = module(tokens, 3, scores)
    assert torch.equal(compiled(module)(tokens, 3, scores), expected)
    assert num_graphs() == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("default::DeprecationWarning")
@pytest.mark.parametrize("method", [ATC(), KMedoids(weighted=True), RandomClusters()], ids=str)
def test_inductor_gives_the_same_result(method):
    module, tokens = Merger(method), random_tokens(2, GRID)
    scores = scores_for(method, tokens)
    result = compiled(module, "inductor")(tokens, 3, scores)
    torch.testing.assert_close(result, module(tokens, 3, scores))
    assert num_graphs() == 1


def test_a_new_seed_does_not_compile_a_deterministic_method_again():
    module, tokens = Merger(ATC()), random_tokens(2, GRID)
    fast = compiled(module)
    for seed in range(5):
        assert torch.equal(fast(tokens, seed), module(tokens, seed))
    assert num_graphs() == 1


def test_a_random_method_follows_its_seed_in_at_most_two_graphs():
    module, tokens = Merger(RandomClusters()), random_tokens(2, GRID)
    fast = compiled(module)
    for seed in range(5):
        assert torch.equal(fast(tokens, seed), module(tokens, seed))
    assert num_graphs() <= 2


@pytest.mark.parametrize("method", [ATC(), KMedoids()], ids=str)
def test_all_tokens_kept_compiles(method):
    module, tokens = Merger(method, GRID.num_tokens), random_tokens(2, GRID)
    torch.testing.assert_close(compiled(module)(tokens), tokens.tanh())


def test_gradients_flow_through_the_merge_and_not_through_the_clusters():
    module = Merger(KMedoids(weighted=True))
    plain, tokens = (random_tokens(2, GRID).requires_grad_() for _ in range(2))
    module(plain, 0, scores_for(module.method, plain)).sum().backward()
    compiled(module, "aot_eager")(tokens, 0, scores_for(module.method, tokens)).sum().backward()
    torch.testing.assert_close(tokens.grad, plain.grad)


def test_autocast_does_not_reach_into_the_operator():
    module, tokens = Merger(ToMe()), random_tokens(2, GRID, channels=64)
    expected = module(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(module)(tokens), expected)


def test_the_operator_passes_torchs_own_checks():
    tokens = random_tokens(2, GRID)
    for method, scores in (("atc", None), ("kmedoids:weighted=true", torch.rand(2, 24))):
        torch.library.opcheck(
            torch.ops.sd_tokenmerge.cluster_tokens.default,
            (tokens, method, 9, GRID.height, GRID.width, 0, scores),
        )


@dataclass(frozen=True)
class Halves(Method):
    name: ClassVar[str] = "halves"

    def _cluster(self, tokens, num_clusters, grid, seed, scores):
        labels = torch.arange(grid.num_tokens) % num_clusters
        return Partition(labels.repeat(len(tokens), 1), num_clusters)


def test_a_method_of_ones_own_works_eagerly_and_says_what_it_needs_to_compile():
    module, tokens = Merger(Halves()), random_tokens(1, GRID)
    assert module(tokens).shape == tokens.shape
    with pytest.raises(Exception, match="Halves must be in `METHODS` under the name 'halves'"):
        compiled(module)(tokens)
