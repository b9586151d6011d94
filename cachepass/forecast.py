"""Forecasts: a predicted value is ``sum_j w_j * h_j`` over the last outputs kept, newest first.

The graph knows only the number of outputs kept and, where they never change, the weights; everything else about a
method's mathematics ends here as a few host numbers. The Taylor weights are derived once with sympy from the recursion
that TaylorSeer defines on its factors and turned into plain Python functions.

    f_0 = h_0,   f_{j+1} = (f_j - previous f_j) / gap,   prediction = sum_j k**j / j! * f_j

Every ``f_j`` is linear in the raw outputs ``h``, so the outputs themselves are kept and the finite differences are
folded into the weights: an update is one write, and nothing is rounded twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy


@dataclass(frozen=True)
class Forecast:
    """What stands in for a cut's value on a predicted step.

    Attributes:
        name: For people: ``"reuse"``, ``"zeros"``, ``"taylor(1)"``.
        history: Number of outputs kept per cut.
        constant_weights: The weights, newest output first, where they never change; None: given at each step.
        recursive: A prediction becomes the newest entry of the history, as a computed output does.
        per_region: The weights may differ from region to region of a group.
    """

    name: str
    history: int
    constant_weights: tuple[float, ...] | None = None
    recursive: bool = False
    per_region: bool = False

    def __str__(self) -> str:
        return self.name


REUSE = Forecast("reuse", history=1, constant_weights=(1.0,))
ZEROS = Forecast("zeros", history=0, constant_weights=())


def taylor(order: int) -> Forecast:
    """TaylorSeer's forecast of the given order; weights from ``taylor_weights``."""
    return Forecast(f"taylor({order})", history=order + 1)


@functools.cache
def _taylor_function(order: int) -> Callable[..., Sequence[float]]:
    """``(k, gap_1, ..., gap_order) -> weights`` of ``h_0 .. h_order``, derived symbolically.

    ``gap_i`` is the distance in steps between the i-th and the (i+1)-th newest output.
    """
    outputs = sympy.symbols(f"h0:{order + 1}")
    gaps = sympy.symbols(f"g1:{order + 1}", positive=True)
    k = sympy.Symbol("k")

    @functools.cache
    def factor(j: int, age: int) -> sympy.Expr:
        """``f_j`` as it stood when output ``age`` was the newest."""
        if j == 0:
            return outputs[age]
        return (factor(j - 1, age) - factor(j - 1, age + 1)) / gaps[age]

    prediction = sympy.expand(sum(k**j / sympy.factorial(j) * factor(j, 0) for j in range(order + 1)))
    weights = [sympy.factor(prediction.coeff(h)) for h in outputs]
    return sympy.lambdify((k, *gaps), weights, modules="math")


def taylor_weights(order: int, steps: Sequence[int], step: int) -> tuple[float, ...]:
    """Weights of the ``order + 1`` outputs kept at ``steps`` (newest first) for a prediction at ``step``.

    With fewer outputs than ``order + 1`` the order is what they allow, and the missing ones weigh 0.
    """
    reached = min(order, len(steps) - 1)
    gaps = [steps[i] - steps[i + 1] for i in range(reached)]
    weights = _taylor_function(reached)(step - steps[0], *gaps)
    return (*map(float, weights), *(0.0,) * (order - reached))
