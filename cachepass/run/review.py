"""Review: what a run that is over shows its user to be wrong, said once."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..method import Method
from .context import DEFAULT
from .runs import Run
from .trajectories import MOST_CALLS

_FROM_NOISE = 900  # a run that begins at a lower timestep is one of image-to-image, and shorter
_QUIET_STEPS = 8  # a run this long says something, also where num_inference_steps is not given


class Review:
    """Looks at the runs of one model: (what it is about, what to say) of each that is over."""

    def __init__(self, method: Method, num_inference_steps: int | None) -> None:
        self._method, self._steps = method, num_inference_steps
        self._short: int | None = None  # steps of the last run that ended early

    def of_run(self, run: Run, partner: Run | None) -> Iterator[tuple[str, str]]:
        """``partner``: the run of the other call of a guidance step."""
        if not run.cached or self._method.measures or not (run.clock.is_over or run.clock.index >= _QUIET_STEPS):
            return
        if not run.predictions and (partner is None or not partner.predictions):
            why = self._method.why_idle(run.clock.seen)
            if why is not None:
                yield "idle", f"the cache never fired in a run of {run.clock.index} steps: {why}"
        other = None if self._steps is not None else self._method.config.why_other(run.clock.index)
        if other is not None:
            yield "other", other
        decider = self._method.recipe.decider
        seen = [distance for distance in run.distances if distance is not None]
        computed = [decider.name in groups for groups, _ in run.record] if decider is not None else []
        if seen and len(computed) >= _QUIET_STEPS and sum(computed) == 1:
            yield (
                "careless",
                f"all of {len(computed)} steps but the first were predicted: no distance reached the threshold of "
                f"{type(self._method.config).__name__} (distances: {min(seen):.3g} to {max(seen):.3g}). Choose it among"
                " these, or cap the steps predicted in a row",
            )

    def of_length(self, run: Run, timestep: float | None) -> Iterator[tuple[str, str]]:
        """A call at this timestep begins another run, as the clock or the timestep says."""
        clock, told, made = run.clock, self._steps, run.clock.index
        if told is None or clock.num_inference_steps != told or timestep is None or run.timestep is None:
            return  # (timesteps on a device are not read at every step)
        if made == told and clock.goes_on(timestep):
            yield (
                "length",
                f"the timestep goes on from {run.timestep:g} to {timestep:g} after {told} steps: "
                f'options["num_inference_steps"] = {told} is less than a run has. A new run was begun',
            )
        elif 0 < made < told and clock.turns_back(timestep) and (clock.highest or 0.0) >= _FROM_NOISE:
            if 2 * made == told or made == self._short:  # one run alone may have been cancelled
                twice = ": if a step has two calls, count one of them" if 2 * made == told else ""
                yield (
                    "length",
                    f'a run ended after {made} steps, and options["num_inference_steps"] is {told}{twice}. What is '
                    "counted from the end of a run never came",
                )
            self._short = made


def untold(module: torch.nn.Module | None, context: str, timestep: float | None) -> str:
    """What to say of a call of which nothing tells whose step it is."""
    name = "the model" if module is None else type(module).__name__
    where = "" if context == DEFAULT else f" in the cache context {context!r}"
    why = (
        "is given other tensors in every call, and its timestep, if it has one, is not read from the device: nothing "
        "tells the calls of a step apart."
    )
    if timestep is not None:
        why = f"was called more than {MOST_CALLS} times at the timestep {timestep:g}: calls of one step, or images?"
    return (
        f"{name} {why} Such calls are computed without a cache{where}; give each trajectory a name, with "
        'cachepass.cache_context("image-1"): ..., or call cachepass.reset(model) between images'
    )


def called_twice(context: str, timestep: float | None) -> str:
    """What to say of a second call of a step of one of several requests."""
    when = "with the same latents" if timestep is None else f"at the timestep {timestep:g}"
    return (
        f"the row {context!r} was called twice {when}: whose step a call is, its name alone tells. "
        'The second one is computed without a cache; name both, with cachepass.cache_context("cond"): ... and '
        '("uncond") inside of cachepass.rows(...)'
    )
