"""When the host waits for the device: never but in the stop tests, and there a few times."""

from __future__ import annotations

from collections import Counter
from math import ceil, log2

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sd_tokenmerge.kernels.agglomerative import agglomerative_labels
from sd_tokenmerge.kernels.device.labels import ROUNDS, fixed_shape_labels
from sd_tokenmerge.kernels.device.rounds import labels_by_rounds
from sd_tokenmerge.kernels.exact import unit_vectors
from tests.kernels.test_agglomerative import mixed_batch
from tests.kernels.token_fields import white_tokens

linkages = pytest.mark.parametrize("linkage", ROUNDS)


@linkages
def test_rounds_run_without_any_data(linkage):
    """A tensor on "meta" has a shape but no numbers, which waiting would ask for."""
    batch = 1 if linkage == "complete" else 3
    rounds = ROUNDS[linkage](torch.empty(batch, 200, 24, dtype=torch.float64, device="meta"), 120)
    for this_round in range(1, 4):
        rounds.search()
        rounds.merge(this_round)
    labels = rounds.labels()
    assert labels.device.type == "meta"
    assert labels.shape == (batch, 200)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        rounds.goes_on()


class Waits(TorchDispatchMode):
    """Count the operators that make the host wait for a device."""

    ALWAYS = (
        "_local_scalar_dense",
        "_unique",
        "_unique2",
        "bincount",
        "equal",
        "is_nonzero",
        "item",
        "masked_select",
        "nonzero",
        "nonzero_static",
        "repeat_interleave",
        "unique_consecutive",
        "unique_dim",
    )

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)):
            chosen = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in chosen):
                self.found["index by mask"] += 1
        elif name in self.ALWAYS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def test_waits_are_found():
    flags = torch.tensor([True, False, True])
    for wait in (
        lambda: flags.any().item(),
        lambda: bool(flags.any()),
        lambda: torch.where(flags),
        lambda: torch.arange(3)[flags],
        lambda: torch.arange(3).masked_select(flags),
        lambda: torch.arange(3).unique(),
        lambda: torch.repeat_interleave(torch.arange(3)),
        lambda: torch.equal(flags, flags),
        lambda: torch.arange(3).index_put((flags,), torch.tensor(7)),
    ):
        with Waits() as waits:
            wait()
        assert waits.found.total() >= 1


class Watched:
    """Count rounds and stop tests, and the waits inside and outside of them."""

    def __init__(self, rounds, monkeypatch):
        self.merges = self.tests = self.tolist = 0
        self.inside, self.outside = Waits(), Waits()
        merge, goes_on, tolist = rounds.merge, rounds.goes_on, Tensor.tolist
        self.testing = False

        def watched_merge(this_round):
            self.merges += 1
            merge(this_round)

        def watched_test():
            self.tests += 1
            self.testing = True
            with self.inside:
                answer = goes_on()
            self.testing = False
            return answer

        def watched_tolist(tensor):
            assert self.testing, "the host reads numbers between stop tests"
            self.tolist += 1
            return tolist(tensor)

        monkeypatch.setattr(rounds, "merge", watched_merge)
        monkeypatch.setattr(rounds, "goes_on", watched_test)
        monkeypatch.setattr(Tensor, "tolist", watched_tolist)
        with self.outside:
            labels_by_rounds(rounds)
        self.outside.found.subtract(self.inside.found)


TOKENS = {
    "mixed": mixed_batch(),
    "white": white_tokens(2 * 300, 16).view(2, 300, 16),
    "all equal": torch.ones(2, 256, 5),
    "equal up to rounding": torch.arange(1.0, 61).unsqueeze(1) * white_tokens(1, 9)[None],
}


@linkages
@pytest.mark.parametrize("case", TOKENS)
@pytest.mark.parametrize("keep", [0.05, 0.5])
def test_the_host_waits_in_stop_tests_only(linkage, case, keep, monkeypatch):
    tokens = TOKENS[case][:1] if linkage == "complete" else TOKENS[case]
    num_merges = tokens.shape[1] - int(keep * tokens.shape[1])
    rounds = ROUNDS[linkage](unit_vectors(tokens.flatten(0, 1)).view(tokens.shape), num_merges)
    watched = Watched(rounds, monkeypatch)
    assert watched.tests == ceil((watched.merges + 1) / rounds.rounds_between_tests)
    assert not +watched.outside.found
    assert watched.tolist <= watched.tests
    assert watched.inside.found.total() <= (4 + 4 * len(tokens)) * watched.tests


@linkages
@pytest.mark.parametrize("count", [64, 256])
@pytest.mark.parametrize("kind", ["ones", "zero", "orthogonal"])
def test_total_ties_take_at_most_one_stop_test_per_halving(linkage, count, kind, monkeypatch):
    tokens = {
        "ones": torch.ones(count, 3),
        "zero": torch.zeros(count, 3),
        "orthogonal": torch.eye(count),
    }[kind]
    watched = Watched(ROUNDS[linkage](unit_vectors(tokens)[None], count - 1), monkeypatch)
    assert watched.tests <= log2(count) + 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@linkages
def test_cuda_does_not_wait_either(linkage):
    tokens = mixed_batch()
    expected = agglomerative_labels(tokens, 200, linkage)
    assert torch.equal(agglomerative_labels(tokens.cuda(), 200, linkage).cpu(), expected)
    assert torch.equal(fixed_shape_labels(tokens.cuda(), 200, linkage).cpu(), expected)
    tokens = tokens[:1]
    rounds = ROUNDS[linkage](unit_vectors(tokens[0])[None].cuda(), 400)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for this_round in range(1, 9):
            rounds.search()
            rounds.merge(this_round)
    finally:
        torch.cuda.set_sync_debug_mode("default")
