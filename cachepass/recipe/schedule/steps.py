"""Schedules of the step index and the timestep alone: known before a run begins."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from ...errors import ConfigError
from ..checks import check_int, check_number
from .base import Past, Schedule, Step, check_schedule


class Plan(Schedule):
    """Base of the schedules that are known before a run begins."""

    @property
    def looks_back(self) -> bool:
        return False


@dataclass(frozen=True)
class Always(Plan):
    """Predicts every step that has a history."""

    def predicts(self, step: Step, past: Past, distance: float | None = None) -> bool | None:  # noqa: ARG002
        return True

    def __str__(self) -> str:
        return "always"


@dataclass(frozen=True)
class Every(Plan):
    """Computes the steps with ``(index - offset) % interval == 0``, predicts the others (before ``offset`` too).

    TaylorSeer (https://arxiv.org/abs/2503.06923) in diffusers' counting, with a warm-up of ``w`` steps:
    ``Every(interval, offset=w + 1) & WarmUp(w)``.

    Attributes:
        interval: Steps from one computed step to the next, >= 1 (1: never predicts).
        offset: Index of one of the computed steps, >= 0.

    Raises:
        ConfigError: A value is no int or out of range.
    """

    interval: int
    offset: int = 0

    def __post_init__(self) -> None:
        check_int(self, "interval", 1)
        check_int(self, "offset", 0)

    def predicts(self, step: Step, past: Past, distance: float | None = None) -> bool | None:  # noqa: ARG002
        return (step.index - self.offset) % self.interval != 0

    def __str__(self) -> str:
        return f"every {self.interval}" + (f" from {self.offset}" if self.offset else "")


@dataclass(frozen=True)
class Timesteps(Plan):
    """Predicts only for ``low < timestep < high``, as Pyramid Attention Broadcast does (arXiv:2408.12588).

    Attributes:
        low, high: Timesteps, usually on the scheduler's scale of 0 to 1000. They may be infinite.

    Raises:
        ConfigError: One is no number, or the range is empty.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        for name, value in (("low", self.low), ("high", self.high)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
                raise self.fail(name, f"expected a number, got {value!r} ({type(value).__name__})")
        if not self.low < self.high:
            raise self.fail("low", f"the range {(self.low, self.high)} is empty or reversed", hint="give low < high")

    @property
    def needs_timestep(self) -> bool:
        return True

    def predicts(self, step: Step, past: Past, distance: float | None = None) -> bool | None:  # noqa: ARG002
        return self.low < step.time(self) < self.high

    def _ahead(self, step: Step, past: Past) -> bool | None:  # noqa: ARG002
        return None

    def __str__(self) -> str:
        return f"{self.low:g} < timestep < {self.high:g}"


@dataclass(frozen=True)
class WarmUp(Plan):
    """Computes the first steps, or one in ``interval`` of them; allows all others.

    cache-dit's ``max_warmup_steps`` and ``warmup_interval``: computed are ``range(0, steps, interval)``. In
    cache-dit a mask takes the place of the warm-up: there give the ``Mask`` alone.

    Attributes:
        steps: Length of the warm-up, >= 0.
        interval: Within it, steps from one computed step to the next, >= 1.

    Raises:
        ConfigError: A value is no int or out of range.
    """

    steps: int
    interval: int = 1

    def __post_init__(self) -> None:
        check_int(self, "steps", 0)
        check_int(self, "interval", 1)

    def predicts(self, step: Step, past: Past, distance: float | None = None) -> bool | None:  # noqa: ARG002
        return step.index >= self.steps or step.index % self.interval != 0

    def __str__(self) -> str:
        return f"warm-up {self.steps}" + (f" by {self.interval}" if self.interval > 1 else "")


@dataclass(frozen=True)
class Retention(Schedule):
    """A warm-up as a share of the run: the first ``int(ratio * n + 0.5)`` of ``n`` steps are computed.

    MagCache's ``retention_ratio`` (https://arxiv.org/abs/2506.09045). ``bind`` turns it into a :class:`WarmUp`.

    Attributes:
        ratio: Share of the steps, 0 to 1.

    Raises:
        ConfigError: The ratio is no number or out of range.
    """

    ratio: float

    def __post_init__(self) -> None:
        check_number(self, "ratio", 0, 1)

    @property
    def needs_steps(self) -> bool:
        return True

    def predicts(self, step: Step, past: Past, distance: float | None = None) -> bool | None:  # noqa: ARG002
        raise unbound(self)

    def bind(self, num_inference_steps: int | None) -> Schedule:
        return WarmUp(int(self.ratio * number_of_steps(self, num_inference_steps) + 0.5))

    def __str__(self) -> str:
        return f"retention {self.ratio:g}"


@dataclass(frozen=True)
class Before(Plan):
    """Predicts only before a step: TaylorSeer's ``disable_cache_after_step``.

    Attributes:
        step: Index from which on all steps are computed, >= 0.

    Raises:
        ConfigError: It is no int or out of range.
    """

    step: int

    def __post_init__(self) -> None:
        check_int(self, "step", 0)

    def predicts(self, step: Step, past: Past, distance: float | None = None) -> bool | None:  # noqa: ARG002
        return step.index < self.step

    def __str__(self) -> str:
        return f"before step {self.step}"


@dataclass(frozen=True)
class Final(Schedule):
    """Computes the last steps of a run, allows all others. ``bind`` turns it into a :class:`Before`.

    Attributes:
        steps: How many steps at the end are computed, >= 0.

    Raises:
        ConfigError: It is no int or out of range.
    """

    steps: int

    def __post_init__(self) -> None:
        check_int(self, "steps", 0)

    @property
    def needs_steps(self) -> bool:
        return True

    def predicts(self, step: Step, past: Past, distance: float | None = None) -> bool | None:  # noqa: ARG002
        raise unbound(self)

    def bind(self, num_inference_steps: int | None) -> Schedule:
        return Before(max(number_of_steps(self, num_inference_steps) - self.steps, 0))

    def __str__(self) -> str:
        return f"final {self.steps}"


@dataclass(frozen=True)
class Refresh(Schedule):
    """Forgets the history at a step and starts the inner schedule anew: it sees indices counted from there.

    cache-dit's ``force_refresh_step_hint``, for pipelines whose model changes its task in the middle of a run. The
    inner warm-up begins again, and so do its caps and ratios, since the group's ``Past`` is cleared with the history.
    Schedules combined with this one see the run's own indices and the cleared ``Past``.

    Attributes:
        schedule: The inner schedule. It must not count from the end of a run: where the run ends is not known to a
            part of it, so ``Final`` stands outside of a refresh.
        at: Index of the step before which the history is forgotten, >= 1.
        repeat: So it is at every further multiple of ``at``.

    Raises:
        ConfigError: A value is of the wrong type or out of range, or the inner schedule needs the number of steps.
    """

    schedule: Schedule
    at: int
    repeat: bool = False

    def __post_init__(self) -> None:
        check_schedule(self, "schedule", self.schedule)
        check_int(self, "at", 1)
        if not isinstance(self.repeat, bool):
            raise self.fail("repeat", f"expected a bool, got {self.repeat!r}")
        if self.schedule.needs_steps:
            raise self.fail(
                "schedule",
                f"{self.schedule} depends on the length of the run, which a refresh divides",
                hint="combine it with the refresh: Refresh(Every(5), at=10) & Final(2); instead of a "
                "preset give Mask.preset(name, steps), instead of a retention WarmUp(steps)",
            )

    def predicts(self, step: Step, past: Past, distance: float | None = None) -> bool | None:
        return self.schedule.predicts(*self._inside(step, past), distance)

    def refreshes(self, step: int) -> bool:
        origin = self._origin(step)
        return (step > 0 and step == origin) or self.schedule.refreshes(step - origin)

    def _origin(self, index: int) -> int:
        return index // self.at * self.at if self.repeat else self.at if index >= self.at else 0

    def _inside(self, step: Step, past: Past) -> tuple[Step, Past]:
        origin = self._origin(step.index)
        computed = tuple(index - origin for index in past.computed if index >= origin)
        return dataclasses.replace(step, index=step.index - origin), dataclasses.replace(past, computed=computed)

    def _parts(self) -> tuple[Schedule, ...]:
        return (self.schedule,)

    def _ahead(self, step: Step, past: Past) -> bool | None:
        return self.schedule._ahead(*self._inside(step, past))

    def __str__(self) -> str:
        return f"refresh {'every' if self.repeat else 'at'} {self.at} ({self.schedule})"


def number_of_steps(owner: Schedule | type[Schedule], num_inference_steps: int | None) -> int:
    """The number of steps of a run; ConfigError if it is None or no int of at least 1."""
    if num_inference_steps is None and isinstance(owner, Schedule):
        raise unbound(owner)
    check_int(owner, "num_inference_steps", 1, value=num_inference_steps)
    assert num_inference_steps is not None
    return num_inference_steps


NEEDS_STEPS = "needs the number of steps of a run"


def unbound(owner: Schedule) -> ConfigError:
    """The error for a schedule that was not told the number of steps."""
    return ConfigError(
        f"{owner} {NEEDS_STEPS}",
        where=type(owner).__name__,
        hint='give options={"num_inference_steps": 28}, or bind(28)',
    )
