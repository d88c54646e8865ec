"""Draws by counter: what they are distributed like, and that they belong to the image."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from unperturb import per_image_rng

INDEX = torch.arange(2000)
DRAWS: dict[str, Callable[..., Tensor]] = {
    "uniform": lambda seed, index, step: per_image_rng.uniform(seed, index, step, (5,)),
    "normal": lambda seed, index, step: per_image_rng.normal(seed, index, step, (5,)),
    "integers": lambda seed, index, step: per_image_rng.integers(seed, index, step, 2**31, 5),
}


# Across images, across pixels of one image, across steps, across seeds: each way a sample must look uniform.
SLICES: dict[str, Callable[[], Tensor]] = {
    "images": lambda: per_image_rng.uniform(3, INDEX, 0, (1,)),
    "pixels": lambda: per_image_rng.uniform(3, INDEX[:1], 0, (2000,)),
    "steps": lambda: torch.cat([per_image_rng.uniform(3, INDEX[:1], step, (1,)) for step in range(2000)]),
    "seeds": lambda: torch.cat([per_image_rng.uniform(seed, INDEX[:1], 0, (1,)) for seed in range(2000)]),
    "far_indices": lambda: per_image_rng.uniform(3, INDEX * 2**40 - 2**50, 0, (1,)),
    "large_steps": lambda: torch.cat(
        [per_image_rng.uniform(3, INDEX[:1], step + (1 << 41), (1,)) for step in range(2000)]
    ),
}


@pytest.mark.parametrize("way", sorted(SLICES))
def test_uniform_and_uncorrelated(way: str) -> None:
    sample = SLICES[way]().flatten().double().numpy()
    assert sample.min() >= 0
    assert sample.max() < 1
    assert stats.kstest(sample, "uniform").pvalue > 1e-3
    # A neighbour says nothing: correlation within 4 standard errors of 0.
    assert abs(np.corrcoef(sample[1:], sample[:-1])[0, 1]) < 4 / np.sqrt(len(sample))


def test_uniform_has_all_its_24_bits() -> None:
    numbers = (per_image_rng.uniform(0, INDEX, 0, (50,)).double() * 2**24).long()
    assert torch.equal(numbers.double() / 2**24, per_image_rng.uniform(0, INDEX, 0, (50,)).double())
    for bit in range(24):
        share = float(((numbers >> bit) & 1).double().mean())
        assert share == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(numbers.numel())), bit


def test_normal() -> None:
    sample = per_image_rng.normal(1, INDEX, 2, (50,)).flatten().double().numpy()
    n = len(sample)
    assert np.isfinite(sample).all()
    assert sample.mean() == pytest.approx(0, abs=4 / np.sqrt(n))
    assert sample.var() == pytest.approx(1, abs=4 * np.sqrt(2 / n))
    assert stats.skew(sample) == pytest.approx(0, abs=4 * np.sqrt(6 / n))
    assert stats.kurtosis(sample) == pytest.approx(0, abs=4 * np.sqrt(24 / n))
    assert stats.kstest(sample, "norm").pvalue > 1e-3
    assert np.abs(sample).max() > 4  # the tails are there


@pytest.mark.parametrize("high", [1, 2, 7, 10, 1000])
def test_integers(high: int) -> None:
    sample = per_image_rng.integers(5, INDEX, 1, high, 10)
    assert sample.shape == (2000, 10)
    assert sample.dtype == torch.int64
    assert 0 <= int(sample.min()) <= int(sample.max()) < high
    if high > 1:
        assert stats.chisquare(torch.bincount(sample.flatten(), minlength=high).numpy()).pvalue > 1e-3


def test_shape_and_type() -> None:
    for make in (per_image_rng.uniform, per_image_rng.normal):
        sample = make(0, INDEX[:4], 0, (3, 8, 5))
        assert sample.shape == (4, 3, 8, 5)
        assert sample.dtype == torch.float32
        assert make(0, INDEX[:0], 0, (3, 8, 5)).shape == (0, 3, 8, 5)
        assert make(0, INDEX[:4].to(torch.int32), 0, (3, 8, 5)).equal(sample)
    assert per_image_rng.integers(0, INDEX[:4], 0, 9).shape == (4, 1)


@pytest.mark.parametrize("kind", sorted(DRAWS))
def test_a_draw_belongs_to_its_image(kind: str) -> None:
    draw = DRAWS[kind]
    index = torch.tensor([7, 100_000, 0, 3, 2**40, 12])
    together = draw(1, index, 5)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(draw(1, index[order], 5), together[order])
    for row, number in enumerate(index):
        assert torch.equal(draw(1, number[None], 5)[0], together[row])
    torch.manual_seed(99)
    assert torch.equal(draw(1, index, 5), together)


@pytest.mark.parametrize("kind", sorted(DRAWS))
def test_other_seeds_images_and_steps_draw_other_numbers(kind: str) -> None:
    # Small numbers in every combination, where a weak mixer would let seed 1 step 2 meet seed 2 step 1.
    rows = [
        tuple(DRAWS[kind](seed, torch.tensor([index]), step)[0].tolist())
        for seed, index, step in itertools.product(range(8), range(8), range(8))
    ]
    assert len(set(rows)) == 8**3
    # Nor may one image's sequence be another's, shifted.
    flat = [number for row in rows for number in row]
    assert len(set(flat)) >= 0.999 * len(flat)


@pytest.mark.parametrize("extreme", [(-1, 0), (2**62, 0), (0, 2**62), (-(2**62), -5)])
def test_any_64_bit_seed_and_step(extreme: tuple[int, int]) -> None:
    seed, step = extreme
    sample: Any = per_image_rng.uniform(seed, INDEX, step, (1,)).flatten().double().numpy()
    assert stats.kstest(sample, "uniform").pvalue > 1e-3


def test_permutation() -> None:
    first = per_image_rng.permutation(3, 0, 100)
    assert sorted(first.tolist()) == list(range(100))
    assert torch.equal(per_image_rng.permutation(3, 0, 100), first)
    assert not torch.equal(per_image_rng.permutation(3, 1, 100), first)
    assert not torch.equal(per_image_rng.permutation(4, 0, 100), first)
    state = torch.get_rng_state()
    per_image_rng.permutation(0, 0, 5)
    assert torch.equal(torch.get_rng_state(), state)
    # Where a given image lands is uniform over epochs.
    places = [int((per_image_rng.permutation(0, epoch, 10) == 4).nonzero()) for epoch in range(1000)]
    assert stats.chisquare(np.bincount(places, minlength=10)).pvalue > 1e-3
