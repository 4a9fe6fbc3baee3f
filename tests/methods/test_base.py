import dataclasses

import pytest
import torch

from sd_tokenmerge.methods import ATC, METHODS, Grid, KMeans, ToMe, ToMeSD
from sd_tokenmerge.options import option_types
from tests.methods.variants import VARIANTS, random_tokens, run


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: ATC(linkage="mean"),
            ValueError,
            r"`linkage` of atc must be one of single, .* got 'mean'",
        ),
        (lambda: ATC(linkage=None), ValueError, "`linkage` of atc must be"),
        (lambda: ToMeSD(random="false"), TypeError, r"`random` of tome-sd must be True or False"),
        (lambda: ToMeSD(random=1), TypeError, "`random` of tome-sd"),
        (lambda: ToMeSD(stride=2.0), TypeError, "`stride` of tome-sd must be an integer, got 2.0"),
        (lambda: ToMeSD(stride=True), TypeError, "`stride` of tome-sd must be an integer"),
        (lambda: KMeans(iterations="5"), TypeError, "`iterations` of kmeans must be an integer"),
    ],
)
def test_options_of_the_wrong_type_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("method_class", METHODS.values(), ids=METHODS)
def test_methods_are_frozen_hashable_values(method_class):
    assert method_class() == method_class()
    assert hash(method_class()) == hash(method_class())
    for option in option_types(method_class):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method_class(), option, None)


def test_options_of_other_types_are_refused_where_they_are_defined():
    @dataclasses.dataclass(frozen=True)
    class Listed(ToMe):
        weights: tuple[float, ...] = ()

    with pytest.raises(TypeError, match="an option must be bool, int, float, str or a Literal"):
        Listed()


def test_the_error_of_an_unreachable_k_says_what_is_reachable():
    with pytest.raises(
        ValueError,
        match=r"`num_clusters` must be in \[8, 32\] for tome-sd on a 4x8 grid "
        r"\(a keep rate of at least 0.25\), got 7\.",
    ):
        ToMeSD().require_reachable(7, Grid(4, 8))


def test_float64_tokens_are_compared_in_float64():
    # Two tokens whose difference is lost in float32, so that only float64 tells which is nearer.
    tokens = torch.tensor([[[1.0, 0.0], [1.0, 3e-9], [1.0, 1e-9]]], dtype=torch.float64)
    labels = KMeans()(tokens, 2, grid=Grid(1, 3)).labels
    assert labels.tolist() == [[0, 1, 0]]


def test_methods_get_tokens_row_by_row_and_leave_the_callers_alone():
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Recorder(ToMe):
        def _cluster(self, tokens, *args):
            seen.append(tokens.clone())
            assert tokens.is_contiguous()
            tokens.zero_()
            return super()._cluster(tokens, *args)

    for dtype in (torch.float16, torch.float32, torch.float64):
        by_channel = torch.randn(2, 3, 16).to(dtype).transpose(1, 2)
        for tokens in (by_channel, by_channel.contiguous()):
            expected = tokens.clone()
            Recorder()(tokens, 9, grid=Grid(4, 4))
            assert torch.equal(tokens, expected)
            assert seen[-1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.equal(seen[-1], expected.to(seen[-1].dtype))


@pytest.mark.parametrize("method", VARIANTS, ids=str)
def test_tokens_that_are_not_used_change_nothing(method):
    grid = Grid(6, 6)
    one, other = (run(method, random_tokens(2, grid, seed=seed), 25, grid) for seed in (0, 1))
    assert torch.equal(one.labels, other.labels) == (not method.uses_tokens)


@pytest.mark.parametrize("method", VARIANTS, ids=str)
def test_the_shape_of_a_grid_that_is_not_used_changes_nothing(method):
    tokens = random_tokens(2, Grid(6, 6))
    one, other = (run(method, tokens, 25, grid) for grid in (Grid(6, 6), Grid(4, 9)))
    assert torch.equal(one.labels, other.labels) == (not method.uses_grid)
