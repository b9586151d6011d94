"""Forecasts that continue the polynomial through the newest outputs; gaps may be uneven."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..checks import check_int
from .form import Forecast
from .rule import ForecastRule, Spacing, check_spacing

MAX_ORDER = 8


def polynomial_weights(nodes: Sequence[float], at: float) -> tuple[float, ...]:
    """Weights with which values at distinct ``nodes`` give the value at ``at`` of the polynomial through them."""
    return tuple(
        math.prod((at - other) / (node - other) for j, other in enumerate(nodes) if j != i)
        for i, node in enumerate(nodes)
    )


@dataclass(frozen=True)
class Extrapolate(ForecastRule):
    """FasterCache (https://arxiv.org/abs/2410.19355): ``h_0 + weight * (h_0 - h_1)`` of the last two outputs, wherever
    they lie, where a prediction is an output, too.

    Attributes:
        weight: Of the last change.
        callback: Module -> weight, in place of it.
    """

    weight: float = 0.5
    callback: Callable[[torch.nn.Module], float] | None = None

    @property
    def form(self) -> Forecast:
        return Forecast("extrapolate", history=2, recursive=True, per_region=self.callback is not None)

    def derive(self, nodes: tuple[float, ...], at: float) -> Sequence[float]:  # noqa: ARG002 (the same everywhere)
        return 1.0 + self.weight, -self.weight

    def of_module(self, module: torch.nn.Module) -> ForecastRule:
        return self if self.callback is None else Extrapolate(float(self.callback(module)))


@dataclass(frozen=True)
class Linear(ForecastRule):
    """The line through the newest two outputs; one alone stands as it is.

    Attributes:
        spacing: What the line runs in: ``"step"`` or ``"timestep"``.

    Raises:
        ConfigError: A field has a value that cannot be used.
    """

    spacing: Spacing = "step"

    def __post_init__(self) -> None:
        check_spacing(self)

    @property
    def form(self) -> Forecast:
        return Forecast("linear", history=2)

    def derive(self, nodes: tuple[float, ...], at: float) -> Sequence[float]:
        return polynomial_weights(nodes, at)


@dataclass(frozen=True)
class Lagrange(ForecastRule):
    """The polynomial through the newest ``order + 1`` outputs, exact on uneven gaps too.

    Missing outputs lower the order.

    Attributes:
        order: Degree of the polynomial, 0 to 8. ``order + 1`` outputs are kept.
        spacing: What the polynomial runs in: ``"step"`` or ``"timestep"``.

    Raises:
        ConfigError: A field has a value that cannot be used.
    """

    order: int = 2
    spacing: Spacing = "step"

    _name: ClassVar[str] = "lagrange"

    def __post_init__(self) -> None:
        check_int(self, "order", 0, MAX_ORDER)
        check_spacing(self)

    @property
    def form(self) -> Forecast:
        return Forecast(f"{self._name}({self.order})", history=self.order + 1)

    def derive(self, nodes: tuple[float, ...], at: float) -> Sequence[float]:
        return polynomial_weights(nodes, at)


@dataclass(frozen=True)
class Newton(Lagrange):
    """Newton's divided differences: the same polynomial as ``Lagrange``, and so the same weights.

    There is one polynomial of degree ``order`` through ``order + 1`` outputs; the two names differ in how it is written
    down, and nothing of that is left in the weights.
    """

    _name: ClassVar[str] = "newton"
