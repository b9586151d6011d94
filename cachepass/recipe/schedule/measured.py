"""Schedules of what a run has done so far and of what it measures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import check_int, check_number
from .base import Bound, Past, Schedule, Step, as_tuple


@dataclass(frozen=True)
class MaxSkips(Schedule):
    """Caps: predicts only while all of them are kept. None: no such cap.

    Attributes:
        total: Predicted steps in a run, >= 0.
        consecutive: Predicted steps from one computed step to the next, >= 0.
        distance: Sum of the raw distances measured in a run, >= 0, which must stay below it. The distance of the step
            in question is not in the sum yet.

    Raises:
        ConfigError: A value is of the wrong type or out of range.
    """

    total: int | None = None
    consecutive: int | None = None
    distance: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("total", self.total), ("consecutive", self.consecutive)):
            if value is not None:
                check_int(self, name, 0, value=value)
        if self.distance is not None:
            check_number(self, "distance", 0)

    def predicts(self, step: Step, past: Past, distance: float | None = None) -> bool | None:  # noqa: ARG002
        return self._counts(past) and (self.distance is None or past.measured < self.distance)

    def _counts(self, past: Past) -> bool:
        return (self.total is None or past.skipped < self.total) and (
            self.consecutive is None or past.streak < self.consecutive
        )

    def _ahead(self, step: Step, past: Past) -> bool | None:  # noqa: ARG002
        if not self._counts(past) or self.distance == 0:
            return False
        return True if self.distance is None else None  # distances are measured on computed steps too

    def __str__(self) -> str:
        caps = ((self.total, "in all"), (self.consecutive, "in a row"), (self.distance, "of distance"))
        shown = ", ".join(f"{cap:g} {of}" for cap, of in caps if cap is not None)
        return f"skips at most {shown}" if shown else "skips without a cap"


MAX_DEGREE = 6  # of the polynomial of a threshold: programs that decide by themselves take as many numbers


@dataclass(frozen=True)
class Threshold(Schedule):
    """Predicts where a probe in the graph has changed little since it was last measured.

    Of the probe's distance ``d`` it takes ``p(d)``, and predicts where that is below ``value``, alone (first-block
    caching) or added to those of the steps predicted since the last computed one (TeaCache,
    https://arxiv.org/abs/2411.19108). A distance or sum that is not finite is never predicted from.

    Attributes:
        value: What it must stay below, a distance without a unit, >= 0.
        accumulate: Add up the distances of the steps predicted in a row.
        inclusive: A distance equal to ``value`` predicts, too.
        coefficients: The polynomial ``p``, at most of degree 6, highest order first as in ``numpy.poly1d``; empty:
            ``p(d) = d``.

    Raises:
        ConfigError: A value is of the wrong type or out of range.
    """

    value: float
    accumulate: bool = False
    inclusive: bool = False
    coefficients: Sequence[float] = ()

    def __post_init__(self) -> None:
        check_number(self, "value", 0)
        for name, flag in (("accumulate", self.accumulate), ("inclusive", self.inclusive)):
            if not isinstance(flag, bool):
                raise self.fail(name, f"expected a bool, got {flag!r}")
        object.__setattr__(self, "coefficients", as_tuple(self, "coefficients", self.coefficients))
        for coefficient in self.coefficients:
            check_number(self, "coefficients", value=coefficient)
        if len(self.coefficients) > 1 + MAX_DEGREE:
            raise self.fail(
                "coefficients",
                f"a polynomial of degree {len(self.coefficients) - 1}",
                f"at most of degree {MAX_DEGREE}",
            )

    @property
    def threshold(self) -> Schedule | None:
        return self

    def predicts(self, step: Step, past: Past, distance: float | None = None) -> bool | None:  # noqa: ARG002
        if distance is None:
            return None
        total = self._accumulated(past) + self._rescaled(distance)
        if not (math.isfinite(distance) and math.isfinite(total)):
            return False
        return total <= self.value if self.inclusive else total < self.value

    def bound(self, past: Past) -> Bound:
        """For a decision in the graph. ``accumulated`` is the sum of ``p(d)`` over the steps predicted in a row, 0
        unless ``accumulate``."""
        return Bound(self._accumulated(past), float(self.value), tuple(self.coefficients), self.inclusive)

    def _accumulated(self, past: Past) -> float:
        return float(sum(map(self._rescaled, past.distances))) if self.accumulate else 0.0

    def _rescaled(self, distance: float) -> float:
        if not self.coefficients:
            return distance
        value = 0.0
        for coefficient in self.coefficients:
            value = value * distance + coefficient
        return value

    def __str__(self) -> str:
        what = "p(distance)" if self.coefficients else "distance"
        return f"{'sum of ' if self.accumulate else ''}{what} {'<=' if self.inclusive else '<'} {self.value:g}"


@dataclass(frozen=True)
class MagnitudeBudget(Schedule):
    """MagCache (https://arxiv.org/abs/2506.09045), with the rule of diffusers' hook.

    From one computed step on, the ratios of the steps are multiplied up, and the products' differences to 1 added up as
    an estimate of the error. A step is predicted while the sum is within ``max_error`` and the row not too long. The
    sum begins behind the last computed step, whatever had it computed: this is MagCache's own rule where no other
    schedule has a say. (diffusers multiplies in float32, this in float64.)

    Attributes:
        ratios: By step index, how much the magnitude of the residual changes from the step before; steps behind the
            end have 1. They belong to a checkpoint and a number of steps.
        max_error: Bound of the estimated error, without a unit, >= 0, included: MagCache's ``threshold``.
        max_consecutive: Longest row of predicted steps, >= 0.
        retention_steps: So many first steps are computed, >= 0. The sum begins behind them at the earliest.

    Raises:
        ConfigError: A value is of the wrong type or out of range.
    """

    ratios: Sequence[float]
    max_error: float
    max_consecutive: int
    retention_steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", as_tuple(self, "ratios", self.ratios))
        if not self.ratios:
            raise self.fail("ratios", "expected at least one number, got none")
        for ratio in self.ratios:
            check_number(self, "ratios", value=ratio)
        check_number(self, "max_error", 0)
        check_int(self, "max_consecutive", 0)
        check_int(self, "retention_steps", 0)

    def predicts(self, step: Step, past: Past, distance: float | None = None) -> bool | None:  # noqa: ARG002
        if not past.computed or step.index < self.retention_steps:
            return False
        begin = max(past.computed[0] + 1, self.retention_steps)
        if step.index - begin >= self.max_consecutive:
            return False
        product, error = 1.0, 0.0
        for index in range(begin, step.index + 1):
            product *= self.ratios[index] if index < len(self.ratios) else 1.0
            error += abs(1.0 - product)
        return error <= self.max_error

    def __str__(self) -> str:
        return (
            f"magnitude error <= {self.max_error:g}, {self.max_consecutive} in a row at most, "
            f"from step {self.retention_steps}"
        )
