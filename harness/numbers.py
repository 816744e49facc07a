"""Two pieces of arithmetic that kept rows and the report share. Needs only the standard library."""

import math
import statistics

# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom: 1.96 is too narrow for few seeds.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
         2.145, 2.131, 2.120, 2.110)


def interval(numbers):
    """Half-width of a 95% interval of the mean, by Student's t; None for a single number."""
    freedom = len(numbers) - 1
    if freedom < 1:
        return None
    t = T_975[freedom - 1] if freedom <= len(T_975) else 1.96 + 2.4 / freedom      # right to 0.01
    return t * statistics.stdev(numbers) / math.sqrt(len(numbers))


def landmarks(values):
    """V(s_p) to V(s_end) of a response -> V(s_p), the sum of those between, V(s_end-1), V(s_end).

    With these the sum of psi is known for every gamma and terminal:
    gamma Phi(s_end) - V(s_p) - (1 - gamma) * the sum of those between.
    """
    return [values[0], math.fsum(values[1:-1]), values[-2], values[-1]]
