"""Requests, and the rows that they bring to calls: host values."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import OptionError


@dataclass(frozen=True)
class Request:
    """One picture to be made, as a scheduler sees it.

    Attributes:
        name: Tells it from all others that are not over; the name of its cache context.
        phases: What each step will do: a string of marks such as ``"##...#..."`` (``#`` computed, ``.`` predicted,
            ``?`` decided in the run), or a sequence of keys, one for each step. Steps with equal keys run the same
            program, so calls of them pay together; :func:`phases_of` makes the keys from a model. A function of the
            step, asked when that step is next, may use what was decided so far.
        size: Rows of one call have equal sizes; any value that tells them apart, such as the latents' shape.
        steps: How many there are, where ``phases`` is a function.
        payload: Whatever the engine needs to make a step, such as the latents; the scheduler does not look at it.

    Raises:
        OptionError: There is no name or no step, or ``steps`` says something else than ``phases``.
    """

    name: str
    phases: Sequence[Hashable] | Callable[[int], Hashable]
    size: Hashable = None
    steps: int = 0
    payload: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise OptionError(f"a request has a name, got {self.name!r}", where="Request", hint="such as 'request-17'")
        known = self.steps if callable(self.phases) else len(self.phases)
        if known < 1 or self.steps not in (0, known):
            raise OptionError(
                f"{self.name!r} has {known} phases and {self.steps} steps",
                where="Request",
                hint="give one phase for each step, or a function and steps=20",
            )
        object.__setattr__(self, "steps", known)

    def phase(self, step: int) -> Hashable:
        """The key of what a step does."""
        return self.phases(step) if callable(self.phases) else self.phases[step]


@dataclass(frozen=True)
class Row:
    """One step of one request: a row of a call.

    Attributes:
        request: Whose step it is.
        step: Which of its steps this is, from 0.
        phase: What the step does.
        arrival: Requests are numbered as they are admitted.
        passed: Calls that were handed out without it since it was ready.
        attempt: How often this step has failed.
    """

    request: Request
    step: int
    phase: Hashable
    arrival: int
    passed: int = 0
    attempt: int = 0

    @property
    def name(self) -> str:
        """The request's."""
        return self.request.name

    @property
    def size(self) -> Hashable:
        """Rows of a call have equal ones."""
        return self.request.size

    @property
    def last(self) -> bool:
        """The request is over when this step is done."""
        return self.step == self.request.steps - 1


@dataclass(frozen=True)
class Call:
    """What an engine does next: free the state of what is over, then call the model for the rows.

    Attributes:
        rows: At most ``max_rows``, of equal sizes; none, if there is nothing to do.
        over: Names of requests that are done or cancelled and whose state is still held. Their places go to those that
            waited, so an engine frees them before it calls the model.
    """

    rows: tuple[Row, ...] = ()
    over: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.rows or self.over)

    @property
    def names(self) -> tuple[str, ...]:
        """Of its rows, in their order."""
        return tuple(row.name for row in self.rows)
