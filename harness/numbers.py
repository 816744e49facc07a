"""Means and their 95% intervals, for the tables, the page and evidence/."""

import math
import statistics

import numpy as np


def t_quantile(freedom):
    """97.5% quantile of Student's t = sqrt(freedom) tan(angle), right to 1e-6 up to freedom = 1000.

    The density of the angle, cos(angle)^(freedom - 1), is summed in trapezoids, cut at 95%.
    """
    angles = np.linspace(0, math.pi / 2, 50_001)
    density = np.cos(angles) ** (freedom - 1)
    area = np.cumsum(density[1:] + density[:-1])
    return math.sqrt(freedom) * math.tan(np.interp(0.95 * area[-1], area, angles[1:]))


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
