"""What a schedule is, what it may know, and how schedules combine."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ...errors import ConfigError, TimestepError
from ..checks import fail
from ..value import Value

_HORIZON = 1000  # steps looked at where a run's number of them is not known: the longest run of a usual scheduler


class Bound(NamedTuple):
    """A decision by a distance ``d``, as numbers: the step is predicted where ``accumulated + p(d) < value`` (``<=`` if
    ``inclusive``) and both sides are finite. ``coefficients`` are those of ``p``, highest order first; empty:
    ``p(d) = d``."""

    accumulated: float
    value: float
    coefficients: tuple[float, ...]
    inclusive: bool


@dataclass(frozen=True)
class Step:
    """Where a call stands within its run: step index from 0, the timestep if it is known, and the model called."""

    index: int
    timestep: float | None = None
    model: torch.nn.Module | None = field(default=None, repr=False)

    def time(self, reader: object) -> float:
        """The timestep.

        Raises:
            TimestepError: It is not known, and ``reader`` needs it.
        """
        if self.timestep is None:
            raise TimestepError(
                f"step {self.index} has no timestep, which {reader} reads",
                where="schedule",
                hint='give options["timestep_input"], or cache_context(name, timestep=)',
            )
        return self.timestep


@dataclass(frozen=True)
class Past:
    """What a run knows about a group when a step comes. Cleared when a run begins and where a schedule refreshes.

    Attributes:
        computed: Indices of the steps whose outputs are kept, newest first. Empty: nothing can be predicted, whatever
            the schedule says; callers check that themselves.
        timesteps: Those of these steps, as far as they are known.
        skipped: Steps predicted in this run.
        streak: Steps predicted since the last computed one.
        distances: The probe's raw distances of the steps predicted since the last computed one, oldest first.
        measured: Sum of all positive raw distances measured in this run, those of computed steps too.
    """

    computed: tuple[int, ...] = ()
    skipped: int = 0
    streak: int = 0
    distances: tuple[float, ...] = ()
    measured: float = 0.0
    timesteps: tuple[float | None, ...] = ()


class Schedule(Value, ABC):
    """At which denoising steps a group of cuts may be predicted instead of computed.

    Schedules are frozen values: equal ones compare and hash equal. They combine: ``a & b`` predicts where both do,
    ``a | b`` where one does, ``~a`` where ``a`` computes. Host code only.
    """

    @abstractmethod
    def predicts(self, step: Step, past: Past, distance: float | None = None) -> bool | None:
        """True: predict the step, False: compute it, None: that depends on the probe's distance, which is not given.

        ``distance`` is this step's raw distance, without a unit. With it the answer is never None. The logic is
        Kleene's, and a threshold is never negated: where the answer is None, the threshold's answer is the schedule's.
        """

    def refreshes(self, step: int) -> bool:
        """The history is forgotten before this step, so it is computed and ``Past`` begins anew."""
        return any(part.refreshes(step) for part in self._parts())

    @property
    def looks_back(self) -> bool:
        """``predicts`` asks what was done in the run; if not, it is a plan of steps and timesteps."""
        return True

    @property
    def can_refresh(self) -> bool:
        """``refreshes`` may be true."""
        return type(self).refreshes is not Schedule.refreshes or any(part.can_refresh for part in self._parts())

    @property
    def needs_timestep(self) -> bool:
        """``predicts`` reads the step's timestep."""
        return any(part.needs_timestep for part in self._parts())

    @property
    def needs_steps(self) -> bool:
        """``bind`` must be given the number of steps before ``predicts`` is asked."""
        return any(part.needs_steps for part in self._parts())

    @property
    def threshold(self) -> Schedule | None:
        """The one part of this schedule that decides by a distance, if there is one; it has a ``bound``."""
        return next((part.threshold for part in self._parts() if part.threshold is not None), None)

    def bound(self, past: Past) -> Bound:
        """What the ``threshold`` compares the distance of the step that comes with.

        Raises:
            ConfigError: The schedule has none.
        """
        threshold = self.threshold
        if threshold is None or threshold is self:
            raise ConfigError(f"{self} decides by no distance", where=type(self).__name__)
        return threshold.bound(past)

    def bind(self, num_inference_steps: int | None) -> Schedule:  # noqa: ARG002 (for those that need it)
        """This schedule for runs of so many steps: what counts from the end of a run becomes step indices.

        Raises:
            ConfigError: The number is needed and None, or less than 1.
        """
        return self

    def never_predicts(self, num_inference_steps: int | None) -> str | None:
        """The reason why no step of a run can be predicted, or None if one may be.

        Up to the first predicted step all are computed, so the run is known up to there but for timesteps and
        distances, which are taken to allow what they can. Of a run of unknown length, 1000 steps are looked at.

        Raises:
            ConfigError: The number of steps is needed and None.
        """
        bound, past = self.bind(num_inference_steps), Past()
        for index in range(num_inference_steps or _HORIZON):
            if bound.refreshes(index):
                past = Past()
            if past.computed and bound._ahead(Step(index), past) is not False:
                return None
            past = Past(computed=(index,))
        if num_inference_steps == 1:
            return "a run of one step has nothing to predict from"
        return f"{self} computes each of {num_inference_steps or f'the first {_HORIZON}'} steps"

    def _parts(self) -> tuple[Schedule, ...]:
        return ()

    def _ahead(self, step: Step, past: Past) -> bool | None:
        """``predicts`` before the run: None too where it depends on what only the run can tell."""
        return self.predicts(step, past)

    @classmethod
    def fail(cls, name: str, what: str, hint: str | None = None) -> ConfigError:
        """The error for a field's value: ``raise self.fail("interval", f"{self.interval} is out of range")``."""
        return fail(cls, name, what, hint)

    def __and__(self, other: Schedule) -> Schedule:
        return And(_flat(And, self, other)) if isinstance(other, Schedule) else NotImplemented

    def __or__(self, other: Schedule) -> Schedule:
        return Or(_flat(Or, self, other)) if isinstance(other, Schedule) else NotImplemented

    def __invert__(self) -> Schedule:
        return Not(self)

    def __bool__(self) -> bool:
        """A schedule is neither true nor false: ``a and b`` would be ``b``."""
        raise ConfigError(
            f"a schedule has no truth value: {self}",
            where=type(self).__name__,
            hint="combine schedules with &, | and ~ instead of and, or and not: Every(3) & WarmUp(2)",
        )


@dataclass(frozen=True)
class _Several(Schedule):
    parts: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.parts:
            raise self.fail("parts", "no schedule is given", hint="Always() predicts every step")
        for part in self.parts:
            check_schedule(self, "parts", part)
        thresholds = [part.threshold for part in self.parts if part.threshold is not None]
        if len(thresholds) > 1:
            raise self.fail(
                "parts",
                f"more than one distance threshold: {', '.join(map(str, thresholds))}",
                hint="the compiled graph compares one distance with one threshold: leave one of them, and combine it "
                "with schedules of step indices or MaxSkips",
            )

    @property
    def looks_back(self) -> bool:
        return any(part.looks_back for part in self.parts)

    def _parts(self) -> tuple[Schedule, ...]:
        return self.parts

    def bind(self, num_inference_steps: int | None) -> Schedule:
        return dataclasses.replace(self, parts=tuple(part.bind(num_inference_steps) for part in self.parts))


@dataclass(frozen=True)
class And(_Several):
    """``a & b``: predicts where every part does."""

    def predicts(self, step: Step, past: Past, distance: float | None = None) -> bool | None:
        answer: bool | None = True  # asked at every call, so without a list
        for part in self.parts:
            said = part.predicts(step, past, distance)
            if said is False:
                return False
            answer = answer and said
        return answer

    def never_predicts(self, num_inference_steps: int | None) -> str | None:
        """The reason, as for every schedule; a part that alone computes everything is named alone."""
        reasons = (part.never_predicts(num_inference_steps) for part in self.parts)
        return next((reason for reason in reasons if reason), None) or super().never_predicts(num_inference_steps)

    def _ahead(self, step: Step, past: Past) -> bool | None:
        return _all([part._ahead(step, past) for part in self.parts])

    def __str__(self) -> str:
        return " & ".join(f"({part})" if isinstance(part, Or) else str(part) for part in self.parts)


@dataclass(frozen=True)
class Or(_Several):
    """``a | b``: predicts where some part does."""

    def predicts(self, step: Step, past: Past, distance: float | None = None) -> bool | None:
        return _negated(_all([_negated(part.predicts(step, past, distance)) for part in self.parts]))

    def _ahead(self, step: Step, past: Past) -> bool | None:
        return _negated(_all([_negated(part._ahead(step, past)) for part in self.parts]))

    def __str__(self) -> str:
        return " | ".join(map(str, self.parts))


@dataclass(frozen=True)
class Not(Schedule):
    """``~a``: predicts where ``a`` computes. What ``a`` refreshes is refreshed all the same."""

    part: Schedule

    def __post_init__(self) -> None:
        check_schedule(self, "part", self.part)
        if self.part.threshold is not None:
            raise self.fail(
                "part",
                f"a distance threshold cannot be negated: {self.part}",
                hint="negate the parts without one, and combine them with it by & and |",
            )

    def predicts(self, step: Step, past: Past, distance: float | None = None) -> bool | None:
        return _negated(self.part.predicts(step, past, distance))

    @property
    def looks_back(self) -> bool:
        return self.part.looks_back

    def bind(self, num_inference_steps: int | None) -> Schedule:
        return Not(self.part.bind(num_inference_steps))

    def _parts(self) -> tuple[Schedule, ...]:
        return (self.part,)

    def _ahead(self, step: Step, past: Past) -> bool | None:
        return _negated(self.part._ahead(step, past))

    def __invert__(self) -> Schedule:
        return self.part

    def __str__(self) -> str:
        return f"~({self.part})"


def _all(values: Sequence[bool | None]) -> bool | None:
    return False if False in values else None if None in values else True


def _negated(value: bool | None) -> bool | None:
    return None if value is None else not value


def _flat(kind: type[_Several], *schedules: Schedule) -> tuple[Schedule, ...]:
    """So that ``(a & b) & c`` equals ``a & (b & c)``."""
    return tuple(part for s in schedules for part in (s.parts if isinstance(s, kind) else (s,)))


def check_schedule(owner: Schedule | type[Schedule], name: str, value: object) -> None:
    """ConfigError unless the value is a schedule."""
    if not isinstance(value, Schedule):
        raise owner.fail(name, f"expected a schedule, got {value!r}", hint="such as Every(5) & WarmUp(3)")


def as_tuple(owner: Schedule | type[Schedule], name: str, values: object) -> tuple[object, ...]:
    """A list, tuple, array or tensor of numbers as a tuple of Python's; ConfigError for anything else."""
    values = values.tolist() if hasattr(values, "tolist") else values  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise owner.fail(name, f"expected a list of numbers, got {values!r}")
    return tuple(values)
