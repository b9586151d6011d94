"""The clock: the step index of a call within its run, and where runs begin.

A run ends when ``num_inference_steps`` calls were made, where that option is given; otherwise when the timestep input
moves against the direction of the run: it rises (or, for models whose timestep ascends from 0 to 1, it falls). The
direction is down until two rises in a row say otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Clock:
    """Counts the committed steps of the current run.

    Attributes:
        num_inference_steps: Calls per run, if known: then counting alone decides.
        index: Steps committed in this run; also the index of the step that comes next.
        lowest, highest: Of the timesteps seen in this run, if any.
    """

    num_inference_steps: int | None = None
    index: int = 0
    lowest: float | None = None
    highest: float | None = None
    _last: float | None = None
    _ascending: bool = False
    _rises: int = 0

    def starts_run(self, timestep: float | None) -> bool:
        """Whether a call with this timestep is the first of a new run, after at least one step of another."""
        if self.index == 0:
            return False
        if self.num_inference_steps is not None:
            return self.index >= self.num_inference_steps
        if timestep is None or self._last is None:
            return False
        if self._ascending:
            return timestep < self._last
        # Two rises in a row: each made a run of its own so far, so nothing wrong was predicted meanwhile.
        return timestep > self._last and not self._turns_ascending(timestep)

    def _turns_ascending(self, timestep: float) -> bool:
        return self._rises >= 1 and self._last is not None and timestep > self._last

    def restart(self) -> None:
        """Begin a new run. The last timestep and the direction are remembered: they tell where the next one begins."""
        self.index, self.lowest, self.highest = 0, None, None

    def forget(self) -> None:
        """Begin a new run and forget the old one altogether (an explicit reset)."""
        self.restart()
        self._last, self._ascending, self._rises = None, False, 0

    def commit(self, timestep: float | None) -> None:
        """A step succeeded."""
        self.index += 1
        if timestep is None:
            return
        if self._last is not None and timestep != self._last:
            if timestep > self._last:
                self._ascending = self._ascending or self._rises >= 1
                self._rises += 1
            else:
                self._ascending, self._rises = self._ascending and self._rises > 1, 0
        self._last = timestep
        self.lowest = timestep if self.lowest is None else min(self.lowest, timestep)
        self.highest = timestep if self.highest is None else max(self.highest, timestep)

    @property
    def seen(self) -> tuple[float, float] | None:
        """The lowest and highest timestep of this run."""
        return None if self.lowest is None or self.highest is None else (self.lowest, self.highest)
