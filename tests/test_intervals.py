"""Intervals and the paired test against closed forms."""

from __future__ import annotations

import math

import pytest

from unperturb.intervals import clopper_pearson, mcnemar, wilson

Z = 1.959963984540054  # the 97.5 % point of the normal distribution


def _wilson_by_hand(k: int, n: int, z: float = Z) -> tuple[float, float]:
    p = k / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return center - half, center + half


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (971, 1000), (9850, 10000)])
def test_wilson_is_its_formula(k: int, n: int) -> None:
    assert wilson(k, n) == pytest.approx(_wilson_by_hand(k, n), abs=1e-12)


def test_wilson_narrows_with_less_confidence() -> None:
    assert wilson(40, 50, confidence=0.9) == pytest.approx(_wilson_by_hand(40, 50, 1.6448536269514722), abs=1e-12)


def test_clopper_pearson_at_the_ends() -> None:
    # With no success the upper end solves (1 - p)^n = alpha / 2.
    low, high = clopper_pearson(0, 20)
    assert low == 0
    assert high == pytest.approx(1 - 0.025 ** (1 / 20), abs=1e-9)
    low, high = clopper_pearson(20, 20)
    assert high == 1
    assert low == pytest.approx(0.025 ** (1 / 20), abs=1e-9)


def test_clopper_pearson_inside_solves_the_binomial_tails() -> None:
    k, n = 7, 12

    def at_most(j: int, p: float) -> float:
        return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(j + 1))

    low, high = clopper_pearson(k, n)
    assert 1 - at_most(k - 1, low) == pytest.approx(0.025, abs=1e-9)
    assert at_most(k, high) == pytest.approx(0.025, abs=1e-9)


def test_mcnemar_is_a_fair_coin() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 0) == mcnemar(0, 5) == pytest.approx(2 / 2**5)
    assert mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert mcnemar(3, 3) == 1


def test_no_images_no_interval() -> None:
    for interval in (wilson, clopper_pearson):
        assert all(math.isnan(v) for v in interval(0, 0))


@pytest.mark.parametrize("interval", [wilson, clopper_pearson])
def test_impossible_counts_are_refused(interval) -> None:
    for k, n in [(-1, 10), (11, 10)]:
        with pytest.raises(ValueError, match="between 0 and n"):
            interval(k, n)
    with pytest.raises(ValueError, match="confidence"):
        interval(1, 2, confidence=95)
    with pytest.raises(ValueError, match="negative"):
        mcnemar(-1, 2)
