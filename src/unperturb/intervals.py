"""What a count is worth: binomial intervals for an accuracy, and a paired test between two models."""

from __future__ import annotations

import operator
from typing import Literal


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion, as `(low, high)` in [0, 1]; `(nan, nan)` where n is 0.

    Raises `ValueError` unless 0 <= successes <= n and 0 < confidence < 1.
    Source: Wilson 1927, without continuity correction.
    """
    return _interval(successes, n, confidence, "wilson")


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval for a proportion, never too short, as `(low, high)` in [0, 1]; `(nan, nan)` where n is 0.

    Raises `ValueError` unless 0 <= successes <= n and 0 < confidence < 1.
    Source: Clopper & Pearson 1934.
    """
    return _interval(successes, n, confidence, "exact")


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p that two models judged on the same images are equally often right.

    b: images only the first gets right. c: images only the second gets right. 1.0 where they never differ.
    Raises `ValueError` for a negative count. Source: McNemar 1947, in its exact binomial form.
    """
    from scipy.stats import binomtest

    b, c = operator.index(b), operator.index(c)
    if b < 0 or c < 0:
        raise ValueError(f"counts of images cannot be negative, got {b} and {c}")
    return float(binomtest(b, b + c, 0.5).pvalue) if b + c else 1.0


def _interval(successes: int, n: int, confidence: float, method: Literal["wilson", "exact"]) -> tuple[float, float]:
    from scipy.stats import binomtest

    successes, n = operator.index(successes), operator.index(n)
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie between 0 and n, got {successes} of {n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, such as 0.95, not {confidence}")
    if n == 0:
        return float("nan"), float("nan")
    found = binomtest(successes, n).proportion_ci(confidence_level=confidence, method=method)
    return float(found.low), float(found.high)
