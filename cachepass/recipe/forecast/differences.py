"""Forecasts from finite differences: TaylorSeer's recursion, with monomials or with Hermite polynomials.

Derived once with sympy from the recursion that TaylorSeer defines on its factors, and turned into plain functions.

    f_0 = h_0,   f_{j+1} = (f_j - previous f_j) / gap,   prediction = sum_j p_j(k) / j! * f_j

``p_j(k)`` is ``k**j`` (TaylorSeer) or a scaled Hermite polynomial (HiCache). Every ``f_j`` is linear in the raw outputs
``h``, so the outputs themselves are kept and the finite differences are folded into the weights: an update is one
write, and nothing is rounded twice.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ...errors import ConfigError
from ..checks import check_int, check_number
from .form import Forecast, taylor
from .rule import ForecastRule, Spacing, check_spacing

if TYPE_CHECKING:
    import sympy

MAX_ORDER = 4


@functools.cache
def _weight_function(order: int, basis: Literal["monomials", "hermite"]) -> Callable[..., Sequence[float]]:
    """``(k, gap_1, ..., gap_order, contraction) -> weights`` of ``h_0 .. h_order``, derived symbolically.

    ``gap_i`` is the distance between the i-th and the (i+1)-th newest output. The contraction is Hermite's alone.
    """
    import sympy  # half a second, which no recipe should wait for

    outputs = sympy.symbols(f"h0:{order + 1}")
    gaps = sympy.symbols(f"g1:{order + 1}")
    k, c = sympy.symbols("k c")

    @functools.cache
    def factor(j: int, age: int) -> sympy.Expr:
        """``f_j`` as it stood when output ``age`` was the newest."""
        if j == 0:
            return outputs[age]
        return (factor(j - 1, age) - factor(j - 1, age + 1)) / gaps[age]

    def polynomial(j: int) -> sympy.Expr:
        return k**j if basis == "monomials" else c**j * sympy.hermite(j, c * k)

    prediction = sympy.expand(sum(polynomial(j) / sympy.factorial(j) * factor(j, 0) for j in range(order + 1)))
    weights = [sympy.factor(prediction.coeff(h)) for h in outputs]
    return sympy.lambdify((k, *gaps, *((c,) if basis == "hermite" else ())), weights, modules="math")


def taylor_weights(order: int, steps: Sequence[float], step: float) -> tuple[float, ...]:
    """Weights of the ``order + 1`` outputs kept at ``steps`` (newest first) for a prediction at ``step``.

    With fewer outputs than ``order + 1`` the order is what they allow, and the missing ones weigh 0.
    """
    reached = min(order, len(steps) - 1)
    gaps = [steps[i] - steps[i + 1] for i in range(reached)]
    weights = _weight_function(reached, "monomials")(step - steps[0], *gaps)
    return (*map(float, weights), *(0.0,) * (order - reached))


@dataclass(frozen=True)
class Taylor(ForecastRule):
    """TaylorSeer (https://arxiv.org/abs/2503.06923): a Taylor series whose derivatives are differences of outputs.

    From order 2 on it differences backward differences, as the paper does: on uneven gaps, and for curves, that is not
    the polynomial through the outputs (``Lagrange`` is). Missing outputs lower the order.

    Attributes:
        order: Highest derivative, 0 to 4. ``order + 1`` outputs are kept.
        spacing: What the series runs in: ``"step"`` or ``"timestep"``.
        since: Differences are formed at outputs of this step or later (cache-dit's calibrator: 3), counted in steps.

    Raises:
        ConfigError: A field has a value that cannot be used.
    """

    order: int = 1
    spacing: Spacing = "step"
    since: int = 0

    def __post_init__(self) -> None:
        check_int(self, "order", 0, MAX_ORDER)
        check_spacing(self)
        check_int(self, "since", 0, 1000)
        if self.since and self.spacing != "step":
            raise ConfigError(
                f"{self.since} is a step, and the series runs in {self.spacing}s",
                where="Taylor.since",
                hint="leave it at 0",
            )

    @property
    def form(self) -> Forecast:
        return taylor(self.order)

    def derive(self, nodes: tuple[float, ...], at: float) -> Sequence[float]:
        order = len(nodes) - 1
        if self.since:
            order = min(order, sum(node >= self.since for node in nodes))
        weights = taylor_weights(order, nodes, at)
        return (*weights, *(0.0,) * (len(nodes) - len(weights)))


@dataclass(frozen=True)
class Hermite(ForecastRule):
    """HiCache (https://arxiv.org/abs/2508.16984): TaylorSeer's differences on scaled Hermite polynomials.

    The prediction is ``sum_j f_j / j! * c**j * H_j(c * k)`` with the physicists' ``H_j``, the contraction ``c`` and
    TaylorSeer's ``f_j``, where ``k`` positions lie between the newest output and the predicted one. A constant is
    forecast exactly. A line is not, unless ``c**2 = 1/2``, where ``c * H_1(c * k)`` is ``k``: with the default the
    slope counts half. Nor are curves: ``H_2`` is no monomial at any contraction. Missing outputs lower the order.

    Attributes:
        order: Highest difference, 0 to 4. ``order + 1`` outputs are kept.
        contraction: ``c``, > 0, per position: with ``spacing="timestep"`` it acts on differences of timesteps, so a
            value found for steps has to be found anew.
        spacing: What ``k`` and the gaps count: ``"step"`` (the paper's) or ``"timestep"``.

    Raises:
        ConfigError: A field has a value that cannot be used.
    """

    order: int = 2
    contraction: float = 0.5
    spacing: Spacing = "step"

    def __post_init__(self) -> None:
        check_int(self, "order", 0, MAX_ORDER)
        check_number(self, "contraction", 0, above=True)
        check_spacing(self)

    @property
    def form(self) -> Forecast:
        return Forecast(f"hermite({self.order})", history=self.order + 1)

    def derive(self, nodes: tuple[float, ...], at: float) -> Sequence[float]:
        gaps = [newer - older for newer, older in itertools.pairwise(nodes)]
        return _weight_function(len(gaps), "hermite")(at - nodes[0], *gaps, self.contraction)
