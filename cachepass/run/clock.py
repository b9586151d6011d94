"""The clock: the step index of a call within its run, and where runs begin.

A run ends when ``num_inference_steps`` calls were made, where that is known, and when the timestep moves against the
direction of the run, whichever comes first: it rises (or, for models whose timestep ascends from 0 to 1, it falls). The
direction is down until two rises in a row say otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def scale_of(timestep: float) -> float | None:
    """The factor from a model's unit to that of schedulers, 1000 to 0, as the first timestep of a run tells it: no run
    in that unit begins at 1 or below. None: 0, where timesteps ascend, tells nothing."""
    return None if timestep == 0 else 1000.0 if isinstance(timestep, float) and timestep <= 1 else 1.0


def scaled(timesteps: Sequence[float], scale: float | None) -> list[float]:
    """The timesteps of a run in the unit of schedulers; ``scale``: what the user said."""
    factor = scale or scale_of(max(map(float, timesteps))) or 1.0
    return [timestep * factor for timestep in timesteps]


@dataclass
class Clock:
    """Counts the committed steps of the current run.

    Attributes:
        num_inference_steps: Calls per run, if known.
        index: The index of the step that comes next: the number of steps committed in this run, unless the library
            says which step it is.
        last: The timestep of the last committed step, of whichever run.
        repeats: How many steps in a row, up to that one, had the timestep of the one before.
        lowest, highest: Of the timesteps seen in this run, if any.
        told: The step of the library's loop, if it said so.
    """

    num_inference_steps: int | None = None
    index: int = 0
    last: float | None = None
    repeats: int = 0
    lowest: float | None = None
    highest: float | None = None
    told: int | None = None
    _first: int | None = None
    _ascending: bool = False
    _rises: int = 0

    @property
    def is_over(self) -> bool:
        """All steps of the run were made."""
        return self.num_inference_steps is not None and self.index >= self.num_inference_steps

    def starts_run(self, timestep: float | None) -> bool:
        """Whether a call with this timestep is the first of a new run, after at least one step of another."""
        return self.index > 0 and (self.is_over or self.turns_back(timestep))

    def turns_back(self, timestep: float | None) -> bool:
        """Whether a timestep lies on the wrong side of the last one, of whichever run."""
        if timestep is None or self.last is None:
            return False
        if self._ascending:
            return timestep < self.last
        # Two rises in a row: each made a run of its own so far, so nothing wrong was predicted meanwhile.
        return timestep > self.last and self._rises == 0

    def goes_on(self, timestep: float) -> bool:
        """Whether a timestep continues where the last one was, in the direction of the run."""
        if self.last is None:
            return False
        return timestep > self.last if self._ascending else timestep < self.last

    def rises_again(self, timestep: float | None) -> bool:
        """This is the second rise in a row: the timesteps ascend, unless two runs began one after the other."""
        if self._ascending or self._rises != 1 or timestep is None or self.last is None:
            return False
        return timestep > self.last

    @property
    def moved(self) -> bool:
        """This run has steps of different timesteps."""
        return self.lowest != self.highest

    def tell(self, step: int) -> None:
        """The library says which step of its loop comes. Steps between two of this run were made without the model, so
        the index skips them; those in front of the first one (another model's, or without guidance) do not count."""
        if self._first is None or self.index == 0:
            self._first = step
        self.told = step
        self.index = max(self.index, step - self._first)

    def goes_back(self, step: int) -> bool:
        """Whether a step of the library's loop lies before the last one. A solver of second order makes one twice, but
        none makes the first one twice."""
        return self.told is not None and (step < self.told or (step == self.told and self.index == 1))

    def restart(self) -> None:
        """Begin a new run. The last timestep and the direction are remembered: they tell where the next one begins."""
        self.index, self.lowest, self.highest, self.repeats = 0, None, None, 0
        self.told = self._first = None

    def forget(self) -> None:
        """Begin a new run and forget the old one altogether (an explicit reset)."""
        self.restart()
        self.last, self._ascending, self._rises = None, False, 0

    def commit(self, timestep: float | None) -> None:
        """A step succeeded."""
        self.index += 1
        if timestep is None:
            return
        if self.last is not None and timestep != self.last:
            if timestep > self.last:
                self._ascending = self._ascending or self._rises >= 1
                self._rises += 1
            else:
                self._ascending, self._rises = self._ascending and self._rises > 1, 0
        self.repeats = self.repeats + 1 if timestep == self.last and self.index > 1 else 0
        self.last = timestep
        self.lowest = timestep if self.lowest is None else min(self.lowest, timestep)
        self.highest = timestep if self.highest is None else max(self.highest, timestep)

    @property
    def seen(self) -> tuple[float, float] | None:
        """The lowest and highest timestep of this run."""
        return None if self.lowest is None or self.highest is None else (self.lowest, self.highest)
