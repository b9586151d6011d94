"""The weights of a Taylor forecast, against closed forms and against TaylorSeer's own recursion."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest

from cachepass.forecast import taylor_weights


def recursion(order: int, values: list[Fraction], steps: list[int], step: int) -> Fraction:
    """TaylorSeer as the paper defines it, replayed over all outputs (oldest first) in exact arithmetic."""
    factors: list[Fraction] = []
    for i, value in enumerate(values):
        new = [value]
        if i:
            for previous in factors[:order]:
                new.append((new[-1] - previous) / (steps[i] - steps[i - 1]))
        factors = new
    k = step - steps[-1]
    return sum((Fraction(k) ** j / math.factorial(j) * f for j, f in enumerate(factors)), Fraction(0))


@pytest.mark.parametrize("order", range(5))
def test_equals_the_recursion_on_uneven_gaps(order):
    rng = random.Random(order)
    for _ in range(20):
        count = rng.randint(1, order + 3)
        steps = sorted(rng.sample(range(30), count))
        values = [Fraction(rng.randint(-50, 50)) for _ in steps]
        step = steps[-1] + rng.randint(1, 6)
        kept = steps[::-1][: order + 1]
        weights = taylor_weights(order, kept, step)
        assert len(weights) == order + 1
        forecast = sum(w * float(v) for w, v in zip(weights, values[::-1], strict=False))
        assert forecast == pytest.approx(float(recursion(order, values, steps, step)), rel=1e-12, abs=1e-9)


@pytest.mark.parametrize("order", range(5))
def test_weights_sum_to_one(order):
    """A constant is forecast exactly, whatever the gaps and however much history there is."""
    for steps in ([7], [9, 4], [9, 7, 4], [12, 9, 7, 4], [15, 12, 9, 7, 4]):
        assert sum(taylor_weights(order, steps[: order + 1], 17)) == pytest.approx(1.0)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_a_line_is_forecast_exactly(order):
    steps = [15, 12, 9, 7, 4][: order + 1]
    # From order 2 on the recursion differences backward differences, so only lines on even gaps stay exact.
    steps = steps if order == 1 else [16, 12, 8, 4, 0][: order + 1]
    weights = taylor_weights(order, steps, 19)
    assert sum(w * (3 * s + 5) for w, s in zip(weights, steps, strict=True)) == pytest.approx(3 * 19 + 5)


def test_short_history_lowers_the_order():
    assert taylor_weights(3, [5], 7) == (1.0, 0.0, 0.0, 0.0)
    assert taylor_weights(3, [5, 3], 7) == (2.0, -1.0, 0.0, 0.0)
