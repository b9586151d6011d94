"""Spectrum's forecast: Chebyshev polynomials fitted to many outputs by ridge regression.

The fit is linear in the outputs, so it is one weight per output like any other forecast, and no coefficient is stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...errors import ConfigError
from ..checks import check_int, check_number
from .form import Forecast
from .interpolation import polynomial_weights
from .rule import ForecastRule, Spacing, check_spacing

MAX_DEGREE = 16
MAX_HISTORY = 128
_SPANS: dict[Spacing, tuple[float, float]] = {"step": (0.0, 50.0), "timestep": (0.0, 1000.0)}


@dataclass(frozen=True)
class Chebyshev(ForecastRule):
    """Spectrum (https://arxiv.org/abs/2603.01623): Chebyshev polynomials in normalised time, fitted to the history.

    The coefficients minimise the squared distance to the outputs kept plus ``ridge`` times their own squares, the
    constant's included, as the authors have it. So the weights sum to less than 1: with the defaults to about 0.9 a few
    steps ahead, and a constant is forecast that much too small. ``anchored`` or a ``blend`` below 1 counters that.
    One output alone stands as it is; with fewer than ``degree + 1`` the degree is what they allow.

    Attributes:
        degree: Highest degree of the polynomials, 0 to 16.
        ridge: Weight of the coefficients' squares, >= 0; 0 fits by least squares.
        history: Number of outputs kept, ``degree + 1`` to 128. Spectrum keeps every output of a run; each costs memory.
        blend: Share of the fit, 0 to 1; the rest is the line through the newest two outputs. The authors advise 0.5
            to 1.
        span: The positions that are -1 and 1 in normalised time: those at which a run begins and ends, in either
            order. None: ``(0, 50)`` for steps, whatever their number, as in the authors' code; ``(0, 1000)`` for
            timesteps.
        anchored: Fit the differences to the newest output instead of the outputs: the ridge then pulls towards reuse
            instead of zero, and constants are exact. Not part of the paper.
        spacing: What time is: ``"step"`` (the authors') or ``"timestep"``.

    Raises:
        ConfigError: A field has a value that cannot be used.
    """

    degree: int = 4
    ridge: float = 0.1
    history: int = 10
    blend: float = 1.0
    span: tuple[float, float] | None = None
    anchored: bool = False
    spacing: Spacing = "step"

    def __post_init__(self) -> None:
        check_int(self, "degree", 0, MAX_DEGREE)
        check_number(self, "ridge", 0)
        check_int(self, "history", self.degree + 1, MAX_HISTORY)
        check_number(self, "blend", 0, 1)
        check_spacing(self)
        if not isinstance(self.anchored, bool):
            raise ConfigError(f"expected a bool, got {self.anchored!r}", where="Chebyshev.anchored")
        if self.span is None:
            return
        numbers = (
            isinstance(self.span, (tuple, list))
            and len(self.span) == 2
            and all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in self.span)
        )
        if not numbers or self.span[0] == self.span[1]:
            raise ConfigError(
                f"expected two different numbers (first, last) or None, got {self.span!r}",
                where="Chebyshev.span",
                hint="such as (0, 50) for a run of 50 steps",
            )
        object.__setattr__(self, "span", tuple(self.span))  # hashable: weights are remembered per rule

    @property
    def form(self) -> Forecast:
        return Forecast(f"chebyshev({self.degree})", history=self.history)

    def derive(self, nodes: tuple[float, ...], at: float) -> Sequence[float]:
        fit = self._fit(nodes, at)
        if self.anchored:
            fit[0] += 1 - sum(fit)
        line = (*polynomial_weights(nodes[:2], at), *(0.0,) * (len(nodes) - 2))
        return [self.blend * f + (1 - self.blend) * w for f, w in zip(fit, line, strict=True)]

    def _fit(self, nodes: tuple[float, ...], at: float) -> list[float]:
        """``T(at) (X^T X + ridge)^-1 X^T`` with ``X`` the polynomials at the nodes.

        By the singular values of ``X``: the normal equations would square its condition, and a small ridge does not
        make up for that.
        """
        first, last = self.span or _SPANS[self.spacing]
        degree = min(self.degree, len(nodes) - 1)
        values = [_polynomials(degree, 2 * (x - first) / (last - first) - 1) for x in (*nodes, at)]
        table = torch.tensor(values, dtype=torch.float64, device="cpu")
        u, s, vh = torch.linalg.svd(table[:-1], full_matrices=False)
        return (u @ (s / (s * s + self.ridge) * (vh @ table[-1]))).tolist()


def _polynomials(degree: int, x: float) -> list[float]:
    """``T_0(x) .. T_degree(x)``."""
    values = [1.0, x]
    for _ in range(degree - 1):
        values.append(2 * x * values[-1] - values[-2])
    return values[: degree + 1]
