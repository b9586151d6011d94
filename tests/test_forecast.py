"""The weights of each forecast, against closed forms and against slow references that see the outputs themselves."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cachepass.forecast as forecasts
from cachepass.errors import ConfigError
from cachepass.forecast import (
    DMD,
    REUSE,
    ZEROS,
    Chebyshev,
    Forecast,
    ForecastRule,
    Hermite,
    Lagrange,
    Linear,
    Newton,
    Reuse,
    Taylor,
    Zeros,
    taylor,
    taylor_weights,
)

POLYNOMIAL = [Linear(), *(Lagrange(order) for order in range(1, 5)), *(Newton(order) for order in range(1, 5))]
CONSTANT = [Reuse(), *POLYNOMIAL, *(Taylor(order) for order in range(5)), *(Hermite(order) for order in range(5)),
            Chebyshev(ridge=0.0), Chebyshev(anchored=True), Chebyshev(blend=0.0)]  # fmt: skip


@st.composite
def positions(draw, count: int, *, low: int = 1):
    """``low`` to ``count`` nodes, newest first, uneven and rising or falling in time, and a position beyond."""
    nodes = draw(st.lists(st.integers(0, 40), min_size=low, max_size=count, unique=True))
    nodes = sorted(nodes, reverse=True)
    at = nodes[0] + draw(st.integers(1, 5))
    if draw(st.booleans()):
        return nodes, at
    return [1000 - 20.5 * node for node in nodes], 1000 - 20.5 * at


def polynomial(coefficients: list[int], x: float, scale: float) -> float:
    return sum(c * (x / scale) ** power for power, c in enumerate(coefficients))


def combine(weights, values) -> float:
    return sum(w * v for w, v in zip(weights, values, strict=False))


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


@pytest.mark.parametrize("order", range(5))
def test_taylor_is_the_recursion_as_a_value(order):
    rule = Taylor(order)
    assert rule.form == taylor(order)
    for nodes in ([9], [9, 6], [9, 6, 3], [16, 13, 9, 4, 2], [20, 18, 16, 13, 9, 4]):
        assert rule.weights(nodes, nodes[0] + 2) == taylor_weights(order, nodes[: order + 1], nodes[0] + 2)


@pytest.mark.parametrize("rule", POLYNOMIAL, ids=lambda rule: str(rule.form))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_polynomials_are_continued_exactly(rule: ForecastRule, data):
    """As high a degree as the nodes allow, on uneven and on falling ones."""
    nodes, at = data.draw(positions(rule.form.history))
    degree = len(nodes) - 1
    coefficients = data.draw(st.lists(st.integers(-9, 9), min_size=degree + 1, max_size=degree + 1))
    scale = max(map(abs, (*nodes, at)))
    weights = rule.weights(nodes, at)
    assert len(weights) == rule.form.history
    assert not any(weights[len(nodes) :])
    values = [polynomial(coefficients, node, scale) for node in nodes]
    size = combine(map(abs, weights), map(abs, values))
    assert combine(weights, values) == pytest.approx(polynomial(coefficients, at, scale), abs=1e-11 * (1 + size))


def test_newton_and_lagrange_are_one_polynomial():
    nodes, at = [30, 24, 23, 11], 31
    assert Newton(3).weights(nodes, at) == Lagrange(3).weights(nodes, at)
    assert Newton(3) != Lagrange(3)
    assert Linear().weights(nodes, at) == pytest.approx(taylor_weights(1, nodes[:2], at))


@pytest.mark.parametrize("rule", CONSTANT, ids=repr)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_constants_are_forecast_exactly(rule: ForecastRule, data):
    nodes, at = data.draw(positions(rule.form.history))
    weights = rule.weights([n / 20 for n in nodes], at / 20)
    assert sum(weights) == pytest.approx(1.0, abs=1e-10 * (1 + sum(map(abs, weights))))


@pytest.mark.parametrize("rule", [*CONSTANT, Chebyshev(), DMD()], ids=repr)
def test_one_output_stands_as_it_is_and_the_newest_at_a_position_counts(rule: ForecastRule):
    history = rule.form.history
    assert rule.weights([7], 9) == (1.0, *(0.0,) * (history - 1))
    assert rule.weights([7, 7, 7], 9) == (1.0, *(0.0,) * (history - 1))
    with pytest.raises(ValueError, match="no output is kept"):
        rule.weights([], 9)


def test_an_output_at_a_repeated_position_is_passed_over():
    once, twice = Lagrange(2).weights([9, 6], 11), Lagrange(2).weights([9, 9, 6], 11)
    assert twice == (once[0], 0.0, once[1])


@pytest.mark.parametrize("rule", [Taylor(3), Hermite(3), Lagrange(3), Chebyshev(span=(0, 50))], ids=repr)
def test_time_may_run_either_way(rule: ForecastRule):
    rising, falling = [14, 9, 7, 2], [50 - n for n in (14, 9, 7, 2)]
    assert rule.weights(rising, 16) == pytest.approx(rule.weights(falling, 50 - 16))


def hermite_polynomial(j: int, x: float) -> float:
    return [1, 2 * x, 4 * x**2 - 2, 8 * x**3 - 12 * x, 16 * x**4 - 48 * x**2 + 12][j]


@pytest.mark.parametrize("order", range(5))
@pytest.mark.parametrize("contraction", [0.5, 0.7, 1.3])
@pytest.mark.parametrize("sign", [1, -1])
def test_hermite_is_its_closed_form(order, contraction, sign):
    """HiCache as the paper defines it: TaylorSeer's factors, replayed, and Hermite polynomials of the distance."""
    steps = [sign * s for s in (19, 15, 13, 8, 4)][: order + 1]
    values, step = [3.0, -1.0, 4.0, 1.5, -5.0][: order + 1], sign * 21
    factors: list[float] = []
    for i in reversed(range(len(steps))):
        new = [values[i]]
        if i + 1 < len(steps):
            for previous in factors:
                new.append((new[-1] - previous) / (steps[i] - steps[i + 1]))
        factors = new
    k = step - steps[0]
    expected = sum(
        f / math.factorial(j) * contraction**j * hermite_polynomial(j, contraction * k) for j, f in enumerate(factors)
    )
    assert combine(Hermite(order, contraction).weights(steps, step), values) == pytest.approx(expected, rel=1e-12)


def test_hermite_continues_a_line_only_where_its_first_polynomial_is_one():
    nodes, at = [9, 5], 12
    assert Hermite(1, math.sqrt(0.5)).weights(nodes, at) == pytest.approx(Linear().weights(nodes, at))
    line, half = Linear().weights(nodes, at), Hermite(1, 0.5).weights(nodes, at)
    assert half[1] == pytest.approx(line[1] / 2)


@pytest.mark.parametrize("spacing", ["step", "timestep"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_chebyshev_reproduces_polynomials_of_its_degree(spacing, data):
    rule = Chebyshev(degree=3, ridge=1e-13, history=7, spacing=spacing, span=(0, 50) if spacing == "step" else None)
    steps = sorted(data.draw(st.lists(st.integers(0, 44), min_size=5, max_size=7, unique=True)), reverse=True)
    step = steps[0] + data.draw(st.integers(1, 5))
    scale = 1 if spacing == "step" else 20  # 1000 down to 0 in 50 steps
    nodes, at = (steps, step) if scale == 1 else ([1000 - 20 * s for s in steps], 1000 - 20 * step)
    coefficients = data.draw(st.lists(st.integers(-9, 9), min_size=4, max_size=4))
    weights = rule.weights(nodes, at)
    size = sum(map(abs, weights))
    if size < 1e3:  # crowded nodes leave the polynomial to the ridge
        values = [polynomial(coefficients, node, 50 * scale) for node in nodes]
        expected = polynomial(coefficients, at, 50 * scale)
        assert combine(weights, values) == pytest.approx(expected, abs=1e-6 * (1 + size))


def ridge_regression(nodes, at, degree, ridge, span) -> torch.Tensor:
    """Spectrum by its definition: the normal equations in normalised time."""
    first, last = span
    tau = (torch.tensor([*nodes, at], dtype=torch.float64) - first) * 2 / (last - first) - 1
    columns = torch.cos(torch.arange(degree + 1) * torch.acos(tau)[:, None])
    x, target = columns[:-1], columns[-1]
    return x @ torch.linalg.solve(x.T @ x + ridge * torch.eye(degree + 1, dtype=torch.float64), target)


def test_chebyshev_is_spectrums_ridge_regression():
    nodes, at = [30, 25, 21, 17, 14, 11, 9, 7, 5, 4], 33
    expected = ridge_regression(nodes, at, 4, 0.1, (0, 50))
    assert Chebyshev().weights(nodes, at) == pytest.approx(expected.tolist())
    line = [*Linear().weights(nodes, at), *[0.0] * 8]
    blended = [0.5 * w + 0.5 * v for w, v in zip(expected.tolist(), line, strict=True)]
    assert Chebyshev(blend=0.5).weights(nodes, at) == pytest.approx(blended)
    short = ridge_regression(nodes[:3], at, 2, 0.1, (0, 40))
    assert Chebyshev(span=(0, 40)).weights(nodes[:3], at) == pytest.approx([*short.tolist(), *[0.0] * 7])
    assert sum(Chebyshev().weights(nodes, at)) < 0.97  # the constant is under the ridge too
    anchored = Chebyshev(anchored=True, ridge=1e9).weights(nodes, at)
    assert anchored == pytest.approx([1.0] + [0.0] * 9, abs=1e-6)


def test_forms():
    rules = [Reuse(), Zeros(), Linear(), Taylor(2), Hermite(2), Lagrange(3), Newton(3), Chebyshev(), DMD(6)]
    names = [
        "reuse",
        "zeros",
        "linear",
        "taylor(2)",
        "hermite(2)",
        "lagrange(3)",
        "newton(3)",
        "chebyshev(4)",
        "dmd(6)",
    ]
    assert [str(rule.form) for rule in rules] == names
    assert [rule.form.history for rule in rules] == [1, 0, 2, 3, 3, 4, 4, 10, 6]
    assert Reuse().form is REUSE and Zeros().form is ZEROS
    assert Zeros().weights([3, 2], 4) == Zeros().weights([], 4) == ()
    assert [rule.needs_gram for rule in rules] == [rule.form.from_gram for rule in rules] == [False] * 8 + [True]
    assert Linear(spacing="timestep").spacing == "timestep" and DMD().spacing == Reuse().spacing == "step"
    assert set(forecasts.__all__) > {"Forecast", "REUSE", "ZEROS", "taylor", "taylor_weights"}
    assert Forecast("line", history=2).from_gram is False


@pytest.mark.parametrize(("make", "where"), [
    (lambda: Taylor(order=5), "Taylor.order"),
    (lambda: Taylor(order=True), "Taylor.order"),
    (lambda: Taylor(1.0), "Taylor.order"),
    (lambda: Taylor(spacing="timesteps"), "Taylor.spacing"),
    (lambda: Linear(spacing=None), "Linear.spacing"),
    (lambda: Hermite(order=-1), "Hermite.order"),
    (lambda: Hermite(contraction=0), "Hermite.contraction"),
    (lambda: Hermite(contraction=math.inf), "Hermite.contraction"),
    (lambda: Lagrange(order=9), "Lagrange.order"),
    (lambda: Newton(order="2"), "Newton.order"),
    (lambda: Chebyshev(degree=-1), "Chebyshev.degree"),
    (lambda: Chebyshev(ridge=-0.1), "Chebyshev.ridge"),
    (lambda: Chebyshev(history=4), "Chebyshev.history"),
    (lambda: Chebyshev(blend=1.1), "Chebyshev.blend"),
    (lambda: Chebyshev(blend="half"), "Chebyshev.blend"),
    (lambda: Chebyshev(span=(3, 3)), "Chebyshev.span"),
    (lambda: Chebyshev(span=50), "Chebyshev.span"),
    (lambda: Chebyshev(anchored=1), "Chebyshev.anchored"),
    (lambda: DMD(history=3), "DMD.history"),
    (lambda: DMD(rank=6), "DMD.rank"),
    (lambda: DMD(ridge=None), "DMD.ridge"),
])  # fmt: skip
def test_bad_fields_are_named(make, where):
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.where == where


def test_values_are_frozen_and_hashable():
    assert Chebyshev(span=[0, 20]) == Chebyshev(span=(0, 20))
    assert len({Taylor(1), Taylor(1), Taylor(2), Chebyshev(span=[0, 20])}) == 3
    with pytest.raises(AttributeError):
        Taylor(1).order = 2
