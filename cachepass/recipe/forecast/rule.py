"""What every forecast has in common as a value: its form, its weights, and fields that are checked when it is made."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

import torch

from ..checks import check_among
from ..value import Value
from .form import REUSE, ZEROS, Forecast

#: What positions count: calls of the model within a run, or the timestep that it is given.
Spacing: TypeAlias = Literal["step", "timestep"]

#: Inner products of the outputs kept, newest first: (n, n) float64, as nested sequences or as a CPU tensor.
Gram: TypeAlias = Sequence[Sequence[float]] | torch.Tensor


class ForecastRule(Value, ABC):
    """Base of the forecasts: a frozen value that turns the positions of the outputs kept into their weights.

    A rule of one's own is a frozen dataclass with ``form`` and ``derive``.
    """

    #: ``weights`` needs the inner products of the outputs kept.
    needs_gram: ClassVar[bool] = False

    #: What the positions handed to ``weights`` count.
    spacing: Spacing = "step"

    @property
    @abstractmethod
    def form(self) -> Forecast:
        """What the graph has to know: a name, the number of outputs kept, weights that never change."""

    @abstractmethod
    def derive(self, nodes: tuple[float, ...], at: float) -> Sequence[float]:
        """One weight per node, for 2 to ``form.history`` distinct nodes, newest first; results are remembered."""

    def bind(self, num_inference_steps: int | None) -> ForecastRule:  # noqa: ARG002 (for those that differ)
        """This rule for runs of so many steps; None: unknown."""
        return self

    def of_module(self, module: torch.nn.Module) -> ForecastRule:  # noqa: ARG002 (for those that differ)
        """The rule for one module, where the form says ``per_region``."""
        return self

    def weights(self, nodes: Sequence[float], at: float, gram: Gram | None = None) -> tuple[float, ...]:  # noqa: ARG002
        """Weights of the outputs kept, newest first, for a prediction at the position ``at``.

        One output alone stands as it is, and of several at one position (a solver that evaluates a timestep twice) the
        newest counts.

        Args:
            nodes: Positions of the outputs kept, newest first, rising or falling in time; those beyond
                ``form.history`` are ignored.
            at: The position to predict, in the same unit (``spacing``).
            gram: Inner products of the outputs, for a rule that ``needs_gram``; others ignore it.

        Returns:
            ``form.history`` numbers; 0.0 for outputs that are missing or not made use of.

        Raises:
            ValueError: There is no node, and the rule needs one.
        """
        return _weights(self, tuple(nodes), at)


@functools.lru_cache(maxsize=4096)
def _weights(rule: ForecastRule, nodes: tuple[float, ...], at: float) -> tuple[float, ...]:
    """Remembered: all cuts of a group, and every run of the same schedule, ask for the same positions."""
    history = rule.form.history
    if history == 0:
        return ()
    distinct: dict[float, int] = {}
    for index, node in enumerate(nodes[:history]):
        distinct.setdefault(node, index)
    if not distinct:
        raise ValueError("no output is kept, so there is nothing to forecast from")
    derived = rule.derive(tuple(distinct), at) if len(distinct) > 1 else (1.0,)
    weights = [0.0] * history
    for index, weight in zip(distinct.values(), derived, strict=True):
        weights[index] = float(weight)
    return tuple(weights)


@dataclass(frozen=True)
class Reuse(ForecastRule):
    """The newest output, as it is."""

    @property
    def form(self) -> Forecast:
        return REUSE

    def derive(self, nodes: tuple[float, ...], at: float) -> Sequence[float]:  # noqa: ARG002 (the same everywhere)
        return (1.0, *(0.0 for _ in nodes[1:]))


@dataclass(frozen=True)
class Zeros(ForecastRule):
    """Nothing stands in: zeros, and no output is kept."""

    @property
    def form(self) -> Forecast:
        return ZEROS

    def derive(self, nodes: tuple[float, ...], at: float) -> Sequence[float]:  # noqa: ARG002 (the same everywhere)
        return tuple(0.0 for _ in nodes)


def check_spacing(rule: ForecastRule) -> None:
    """Raise a ConfigError unless the rule's ``spacing`` is one."""
    check_among(rule, "spacing", "spacing", get_args(Spacing))
