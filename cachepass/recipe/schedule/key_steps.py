"""Key steps: the computed steps of a run, found for one number of steps and carried over to others by timestep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import check_int
from .base import Past, Schedule, Step, as_tuple
from .mask import Mask

_NEAR = 1e-6  # timesteps within this share of the whole range are one


@dataclass(frozen=True)
class KeySteps(Schedule):
    """Computes chosen steps, and predicts the others.

    In a run of as many steps as ``timesteps`` has, these are the steps of these numbers. In any other run (a sampler of
    30 steps, or the last 30 of 50 that make an image from an image) a step is computed when its timestep reaches, or
    has passed, that of a key step and none was computed since.

    Attributes:
        computed: The key steps, rising.
        timesteps: Those of the run that they were found in, by step; in the unit of 1000 to 0.

    Raises:
        ConfigError: A key step is no step of the run, they do not rise, or a timestep is no number.
    """

    computed: Sequence[int]
    timesteps: Sequence[float]

    def __post_init__(self) -> None:
        for name in ("computed", "timesteps"):
            object.__setattr__(self, name, as_tuple(self, name, getattr(self, name)))
        if not self.computed or not self.timesteps:
            raise self.fail("computed", "there is no key step, or no timestep", hint="step 0 is always one")
        for step in self.computed:
            check_int(self, "computed", 0, len(self.timesteps) - 1, value=step)
        if sorted(set(self.computed)) != list(self.computed):
            raise self.fail("computed", f"they do not rise: {list(self.computed)}")
        for timestep in self.timesteps:
            if isinstance(timestep, bool) or not isinstance(timestep, (int, float)):
                raise self.fail("timesteps", f"expected numbers, got {timestep!r}")

    @property
    def needs_timestep(self) -> bool:
        return True

    def bind(self, num_inference_steps: int | None) -> Schedule:
        """A mask for runs of as many steps; itself, by timesteps, for others."""
        if num_inference_steps != len(self.timesteps):
            return self
        return Mask([int(step in self.computed) for step in range(len(self.timesteps))])

    def predicts(self, step: Step, past: Past, distance: float | None = None) -> bool | None:  # noqa: ARG002
        last = next((timestep for timestep in past.timesteps if timestep is not None), None)
        if last is None:
            return False
        return not self._due(last, step.time(self))

    def _due(self, last: float, now: float) -> bool:
        """A key step's timestep was reached since the last computed step."""
        first, end = self.timesteps[0], self.timesteps[-1]
        sign = 1.0 if end <= first else -1.0  # most fall
        slack = _NEAR * abs(end - first)
        return any(sign * now <= sign * t + slack and sign * t + slack < sign * last for t in self._times)

    @property
    def _times(self) -> list[float]:
        return [self.timesteps[step] for step in self.computed]

    def _ahead(self, step: Step, past: Past) -> bool | None:
        return None if step.timestep is None else self.predicts(step, past)

    def __str__(self) -> str:
        steps = ", ".join(map(str, self.computed))
        return f"key steps {steps} of {len(self.timesteps)}"
