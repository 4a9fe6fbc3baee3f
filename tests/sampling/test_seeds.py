from __future__ import annotations

import pytest

from sd_tokenmerge.sampling.seeds import SEED_LIMIT, image_seed


@pytest.mark.parametrize(
    ("arguments", "seed"),
    [((0, 0, 0), 0), ((0, 1, 0), 10), ((0, 999, 9), 9999), ((100, 12, 3), 223)],
)
def test_paper_seeds_concatenate_digits(arguments: tuple[int, int, int], seed: int) -> None:
    assert image_seed(*arguments) == seed


def test_paper_seeds_differ_for_all_images_of_a_run() -> None:
    assert len({image_seed(0, c, i) for c in range(1000) for i in range(10)}) == 10_000


def test_paper_seeds_refuse_the_eleventh_image_because_they_would_collide() -> None:
    assert int(f"{1}{10}") == int(f"{11}{0}")
    with pytest.raises(ValueError, match="`image_index` must be below 10"):
        image_seed(0, 1, 10)


def test_hashed_seeds_are_fixed_distinct_and_in_range() -> None:
    seeds = {image_seed(b, c, i, "hashed") for b in range(2) for c in range(50) for i in range(50)}
    assert len(seeds) == 5000
    assert all(0 <= seed < SEED_LIMIT for seed in seeds)
    # `printf 0,1,2 | sha256sum` begins with these 64 bits
    assert image_seed(0, 1, 2, "hashed") == 0xC0BE322C1AD6AF50 >> 1


@pytest.mark.parametrize("arguments", [(-1, 0, 0), (0, -1, 0), (0, 0, -1)])
def test_negative_numbers_are_refused(arguments: tuple[int, int, int]) -> None:
    for scheme in ("paper", "hashed"):
        with pytest.raises(ValueError, match="must not be negative"):
            image_seed(*arguments, scheme)  # type: ignore[arg-type]


def test_seeds_beyond_torchs_range_are_refused() -> None:
    with pytest.raises(ValueError, match="`base` must leave seeds below"):
        image_seed(SEED_LIMIT - 1, 1, 0)
    with pytest.raises(ValueError, match="`scheme` must be one of"):
        image_seed(0, 0, 0, "own")  # type: ignore[arg-type]
