"""Properties of `Partition` and of keep rates, on generated examples."""

from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_tokenmerge.methods import Grid, Method
from sd_tokenmerge.partitions import Partition, clusters_to_keep
from tests.methods.variants import VARIANTS, random_tokens, run
from tests.reference.sets import as_sets

ORDER_FREE = {"atc", "kmeans", "kmedoids", "dpc-knn"}
"""Methods that see a set of tokens: neither position nor order matters."""
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@st.composite
def partitions(draw, max_batch=3, max_tokens=24):
    """A valid partition, with or without representatives."""
    batch = draw(st.integers(1, max_batch))
    num_tokens = draw(st.integers(1, max_tokens))
    num_clusters = draw(st.integers(1, num_tokens))
    rows, chosen = [], []
    for _ in range(batch):
        rest = draw(
            st.lists(
                st.integers(0, num_clusters - 1),
                min_size=num_tokens - num_clusters,
                max_size=num_tokens - num_clusters,
            )
        )
        row = draw(st.permutations(list(range(num_clusters)) + rest))
        rows.append(row)
        members = [[t for t, label in enumerate(row) if label == k] for k in range(num_clusters)]
        chosen.append([draw(st.sampled_from(tokens)) for tokens in members])
    representatives = torch.tensor(chosen) if draw(st.booleans()) else None
    return Partition(torch.tensor(rows), num_clusters, representatives).check()


def features(length, partition, dtype=torch.float64, seed=0):
    """Random features `[B, length, 3]` for a partition."""
    generator = torch.Generator().manual_seed(seed)
    shape = (partition.labels.shape[0], length, 3)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@given(partitions(), st.sampled_from(DTYPES))
def test_merging_what_was_unmerged_gives_it_back(partition, dtype):
    # The mean of n equal numbers is off by a rounding of their sum; half precision hides that.
    rounding = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 0)
    merged = features(partition.num_clusters, partition, dtype)
    again = partition.merge(partition.unmerge(merged))
    torch.testing.assert_close(again, merged, rtol=rounding, atol=0)


@given(partitions())
def test_a_merged_token_is_the_mean_of_its_cluster_or_its_representative(partition):
    tokens = features(partition.labels.shape[1], partition)
    merged = partition.merge(tokens)
    for image, row in enumerate(partition.labels):
        for cluster in range(partition.num_clusters):
            members = tokens[image, row == cluster]
            expected = members.mean(0)
            if partition.representatives is not None:
                expected = tokens[image, partition.representatives[image, cluster]]
            torch.testing.assert_close(merged[image, cluster], expected)
            assert partition.sizes[image, cluster] == len(members)


@given(partitions())
def test_unmerging_gives_every_token_its_cluster(partition):
    merged = features(partition.num_clusters, partition)
    unmerged = partition.unmerge(merged)
    for image, row in enumerate(partition.labels):
        for token, label in enumerate(row.tolist()):
            assert torch.equal(unmerged[image, token], merged[image, label])


@given(partitions())
def test_merging_twice_is_merging_once(partition):
    tokens = features(partition.labels.shape[1], partition)
    once = partition.unmerge(partition.merge(tokens))
    torch.testing.assert_close(partition.unmerge(partition.merge(once)), once)


@given(partitions())
def test_images_do_not_mix(partition):
    tokens = features(partition.labels.shape[1], partition)
    together = partition.merge(tokens)
    for image in range(len(tokens)):
        representatives = partition.representatives
        alone = Partition(
            partition.labels[image : image + 1],
            partition.num_clusters,
            None if representatives is None else representatives[image : image + 1],
        )
        assert torch.equal(alone.merge(tokens[image : image + 1])[0], together[image])


@given(st.integers(1, 2), st.permutations(list(range(12))))
def test_all_tokens_kept_only_reorders(batch, order):
    tokens = random_tokens(batch, Grid(3, 4))
    partition = Partition(torch.tensor([order] * batch), 12).check()
    assert torch.equal(partition.unmerge(partition.merge(tokens)), tokens)
    assert torch.equal(partition.merge(tokens), tokens[:, torch.tensor(order).argsort()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    # A running sum in half precision stops growing long before 4,096 ones are added,
    # and its largest finite value is 65,504.
    partition = Partition(torch.zeros(1, 4096, dtype=torch.int64), 1)
    assert partition.merge(torch.ones(1, 4096, 2, dtype=dtype)).tolist() == [[[1.0, 1.0]]]
    large = torch.full((1, 4096, 2), 30000.0, dtype=dtype)
    assert torch.equal(partition.merge(large), large[:, :1])
    assert partition.merge(large).dtype == dtype


def test_gradients_of_merge_and_unmerge():
    partition = Partition(torch.tensor([[0, 1, 0, 2, 1], [2, 2, 1, 0, 2]]), 3)
    tokens = features(5, partition).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: partition.unmerge(partition.merge(x)), tokens)
    chosen = Partition(partition.labels, 3, torch.tensor([[2, 1, 3], [3, 2, 4]])).check()
    assert torch.autograd.gradcheck(lambda x: chosen.unmerge(chosen.merge(x)), tokens)


@pytest.mark.parametrize(
    ("labels", "representatives", "message"),
    [
        ([[0, 1, 3]], None, r"`labels` must be in \[0, 3\), got values from 0 to 3"),
        ([[0, -1, 2]], None, r"`labels` must be in \[0, 3\), got values from -1 to 2"),
        # in a batch these would be another image's clusters
        ([[0, 1, 2], [0, -1, 2]], None, r"`labels` must be in \[0, 3\), got values from -1 to 2"),
        ([[0, 3, 2], [0, 1, 2]], None, r"`labels` must be in \[0, 3\), got values from 0 to 3"),
        ([[0, 0, 2]], None, r"`labels` must use every label in \[0, 3\), got 1 unused"),
        ([[0, 1, 2], [1, 1, 1]], None, "got 2 unused"),
        ([[0, 1, 2]], [[1, 0, 2]], "`representatives` must be members of their own clusters"),
        ([[0, 1, 2]], [[0, 1, 3]], r"`representatives` must be in \[0, 3\)"),
        ([[0, 1, 2]], [[0, 1, -1]], r"`representatives` must be in \[0, 3\)"),
        ([[0, 1, 2]], [[0, 1]], r"`representatives` must be \[1, 3\], got \[1, 2\]"),
    ],
)
def test_what_is_no_partition_is_refused(labels, representatives, message):
    chosen = None if representatives is None else torch.tensor(representatives)
    with pytest.raises(ValueError, match=message):
        Partition(torch.tensor(labels), 3, chosen)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([[0, 0, 0]], TypeError, "`labels` must be a tensor, got list"),
        (torch.zeros(3).long(), ValueError, r"`labels` must be .* two-dim.*, got shape \[3\]"),
        (torch.zeros(1, 0).long(), ValueError, r"`labels` must be non-empty .* \[1, 0\]"),
        (torch.zeros(1, 3).int(), ValueError, "`labels` must be int64, got torch.int32"),
        (torch.zeros(1, 3).bool(), ValueError, "`labels` must be int64, got torch.bool"),
        (torch.zeros(1, 3), ValueError, "`labels` must be int64, got torch.float32"),
    ],
)
def test_labels_of_the_wrong_form_are_refused(labels, error, message):
    with pytest.raises(error, match=message):
        Partition(labels, 1)


@pytest.mark.parametrize("num_clusters", [0, -1, 4])
def test_impossible_numbers_of_clusters_are_refused(num_clusters):
    with pytest.raises(
        ValueError, match=rf"`num_clusters` must be in \[1, 3\], got {num_clusters}"
    ):
        Partition(torch.zeros(1, 3, dtype=torch.int64), num_clusters)


def test_elsewhere_than_on_a_cpu_the_form_is_checked_without_waiting():
    # meta tensors have no values to wait for
    labels = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    Partition(labels, 3, torch.zeros(2, 3, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match=r"`labels` must be int64, got torch.int32"):
        Partition(labels.int(), 3)
    with pytest.raises(ValueError, match=r"`representatives` must be \[2, 3\], got \[2, 5\]"):
        Partition(labels, 3, labels)


@pytest.mark.parametrize("shape", [(5, 4), (1, 5, 4), (2, 6, 4), (2, 5, 4, 1)])
def test_features_of_another_shape_are_refused(shape):
    partition = Partition(torch.tensor([[0, 1, 0, 2, 1], [2, 2, 1, 0, 2]]), 3)
    with pytest.raises(ValueError, match=r"`tokens` must be \[2, 5, C\], got") as error:
        partition.merge(torch.zeros(shape))
    assert str(list(shape)) in str(error.value)
    with pytest.raises(ValueError, match=r"`merged` must be \[2, 3, C\], got"):
        partition.unmerge(torch.zeros(shape))


@settings(max_examples=15)
@given(order=st.permutations(list(range(20))), data=st.data())
@pytest.mark.parametrize("method", [m for m in VARIANTS if m.name in ORDER_FREE], ids=str)
def test_permuting_the_tokens_permutes_the_labels(method: Method, order, data):
    grid = Grid(4, 5)
    num_clusters = data.draw(st.integers(1, 20))
    tokens = random_tokens(1, grid).double()
    scores = torch.rand(1, 20, generator=torch.Generator().manual_seed(1))
    scores = scores if method.uses_scores else None
    labels = method(tokens, num_clusters, grid=grid, scores=scores).labels
    permuted = method(
        tokens[:, order],
        num_clusters,
        grid=grid,
        scores=scores[:, order] if scores is not None else None,
    ).labels
    assert as_sets(permuted[0]) == as_sets(labels[0, order])


@pytest.mark.parametrize("method", [m for m in VARIANTS if m.name not in ORDER_FREE], ids=str)
def test_the_other_methods_do_depend_on_the_order(method):
    grid = Grid(4, 5)
    tokens = random_tokens(1, grid).double()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    labels = run(method, tokens, 12, grid).labels[0]
    permuted = run(method, tokens[:, order], 12, grid).labels[0]
    assert as_sets(permuted) != as_sets(labels[order])


@given(st.integers(1, 20000), st.integers(1, 1000))
def test_keep_rates_in_decimals_are_exact(num_tokens, thousandths):
    rate = Fraction(thousandths, 1000)
    expected = num_tokens - floor(num_tokens * (1 - rate))
    assert clusters_to_keep(num_tokens, thousandths / 1000) == expected
    assert clusters_to_keep(num_tokens, 1 - (1000 - thousandths) / 1000) == expected


@given(st.integers(1, 20000), st.integers(1, 30), st.data())
def test_keep_rates_of_simple_fractions_are_exact(num_tokens, denominator, data):
    numerator = data.draw(st.integers(1, denominator))
    removed = floor(num_tokens * (1 - Fraction(numerator, denominator)))
    assert clusters_to_keep(num_tokens, numerator / denominator) == num_tokens - removed


@given(st.integers(1, 20000), st.floats(0, 1, exclude_min=True))
def test_never_fewer_tokens_are_merged_than_asked(num_tokens, rate):
    kept = clusters_to_keep(num_tokens, rate)
    assert 1 <= kept <= num_tokens - floor(num_tokens * (1 - Fraction(rate)))


@pytest.mark.parametrize(
    ("num_tokens", "keep_rate", "expected"),
    [(4096, 0.9, 3687), (10, 0.7, 7), (10, 0.9, 9), (4096, 0.5, 2048), (7, 1, 7), (5, 1e-9, 1)],
)
def test_numbers_of_clusters(num_tokens, keep_rate, expected):
    assert clusters_to_keep(num_tokens, keep_rate) == expected


@pytest.mark.parametrize("keep_rate", [0, -0.1, 1.0001, float("nan"), float("inf")])
def test_impossible_keep_rates_are_refused(keep_rate):
    with pytest.raises(ValueError, match=r"`keep_rate` must be in \(0, 1\], got"):
        clusters_to_keep(100, keep_rate)


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match="`num_tokens` must be at least 1, got 0"):
        clusters_to_keep(0, 0.5)
