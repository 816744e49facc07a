"""Means and their 95% intervals, for the tables, the page and evidence/."""

import math
import statistics
from functools import lru_cache


@lru_cache(maxsize=None)
def t_quantile(freedom):
    """97.5% quantile of Student's t for whole degrees of freedom.

    Bisection of the angle atan(t / sqrt(freedom)): the probability of less than t, both signs
    together, is a finite sum of its cosine (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    low, high, odd = 0.0, math.pi / 2, freedom % 2
    for _ in range(60):
        angle = (low + high) / 2
        cos, total = math.cos(angle), 0.0
        term = cos if odd else 1.0
        for power in range(odd, freedom - 1, 2):
            total += term
            term *= (power + 1) / (power + 2) * cos ** 2
        total *= math.sin(angle)
        inside = 2 / math.pi * (angle + total) if odd else total
        low, high = (low, angle) if inside > 0.95 else (angle, high)
    return math.sqrt(freedom) * math.tan(low)


def interval(numbers):
    """Half-width of a 95% interval of the mean, by Student's t; None for a single number."""
    n = len(numbers)
    return t_quantile(n - 1) * statistics.stdev(numbers) / math.sqrt(n) if n > 1 else None


def summary(numbers):
    """Numbers, None for an unknown one -> the mean of the known ones and its interval, or None."""
    known = [x for x in numbers if x is not None]
    return (statistics.fmean(known), interval(known)) if known else (None, None)


def plus_minus(mean, half, form):
    """"2.36 ± 0.46", "2.36" where the interval is unknown, "-" where the mean is."""
    margin = "" if half is None else f" \u00b1 {half:{form.strip('+')}}"
    return "-" if mean is None else f"{mean:{form}}{margin}"
