"""Candidates: computed steps and weights, from fixed methods and from searches over a Gram matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..recipe.forecast import Fit, Fitted, ForecastRule, Hermite, Reuse, Taylor
from ..recipe.schedule import Mask
from .fitting import Weights, fit_jointly, kept_at, squared_error
from .schedules import Steps, descend, grown, shortest_paths, spread_evenly

DEPTHS = (2, 3, 4)  # outputs kept by fitted forecasts
FORECASTS: tuple[ForecastRule, ...] = (Reuse(), Taylor(1), Taylor(2), Hermite(2))
_WARM_UPS = (1, 2, 3, 5)
SPREAD = 0.3  # of a first fit
_PRESETS = ("slow", "medium", "fast", "ultra")


@dataclass(frozen=True)
class Candidate:
    """A schedule with its weights.

    Attributes:
        name: Where it comes from, for people.
        computed: The computed steps, rising.
        weights: By step; None: the step is computed.
        forecast: The rule that gave the weights; None: they were fitted.
        spread: With which they were, for :func:`fitted`.
    """

    name: str
    computed: Steps
    weights: tuple[Weights | None, ...]
    forecast: ForecastRule | None = None
    spread: float = 1.0

    @property
    def depth(self) -> int:
        """Outputs kept."""
        if self.forecast is not None:
            return self.forecast.form.history
        return max((len(weights) for weights in self.weights if weights is not None), default=1)


def fixed(name: str, computed: Steps, steps: int, rule: ForecastRule) -> Candidate:
    """A forecast that needs no fit."""
    weights: list[Weights | None] = [None] * steps
    for step, kept in kept_at(computed, steps, rule.form.history):
        weights[step] = rule.weights(kept, step)
    return Candidate(f"{name}, {rule.form.name}", computed, tuple(weights), rule)


def fixed_methods(
    count: int, steps: int, forecasts: Sequence[ForecastRule] = FORECASTS, warm_ups: Sequence[int] = _WARM_UPS
) -> Iterator[Candidate]:
    """What can be had without tuning, of at most ``count`` computed steps: forecasts on evenly spread steps behind
    warm-ups of several lengths, and on cache-dit's masks."""
    schedules: dict[Steps, str] = {}
    for warm_up in warm_ups:
        for last in (False, True):
            computed = spread_evenly(count, steps, warm_up, last=last)
            ends = " and the last step" if last else ""
            if warm_up <= count:
                schedules.setdefault(computed, f"even, warm-up {warm_up}{ends}")
    for preset in _PRESETS if steps > 1 else ():
        mask = Mask.preset(preset, steps)
        computed = tuple(step for step, is_computed in enumerate(mask.computed) if is_computed)
        if len(computed) <= count:
            schedules.setdefault(computed, f"preset {preset}")
    for computed, name in schedules.items():
        for rule in forecasts:
            yield fixed(name, computed, steps, rule)


def fitted(
    name: str, computed: Steps, gram: torch.Tensor, depth: int, scale: Sequence[float], spread: float
) -> Candidate:
    """Weights fitted for a schedule."""
    weights = fit_jointly(gram, computed, depth, scale, spread).weights
    return Candidate(f"{name}, fitted({depth})", computed, weights, None, spread)


def searched(
    count: int,
    gram: torch.Tensor,
    scale: Sequence[float],
    depths: Sequence[int] = DEPTHS,
    seed: Steps | None = None,
) -> Iterator[Candidate]:
    """Schedules found from the Gram matrix, with weights fitted to them; what a search of fewer steps ended with
    (``seed``) grown to as many."""
    steps = len(gram)
    flat = [sum(scale) / len(scale)] * steps
    schedules: dict[Steps, str] = {}
    for name, weighing in (("shortest path", flat), ("shortest path by length of steps", scale)):
        path = shortest_paths(gram, [count], weighing)[count]
        schedules.setdefault(path, name)
        deep = max(min(depths), min(3, max(depths)))
        for spread in (SPREAD, 1.0):

            def error(computed: Steps, spread: float = spread, deep: int = deep) -> float:
                return fit_jointly(gram, computed, deep, scale, spread).error

            schedules.setdefault(descend(path, error, steps), "descent")
    if seed is not None and len(seed) < count:
        schedules.setdefault(grown(seed, count, gram, scale), "grown")
    schedules.setdefault(spread_evenly(count, steps, 2, last=False), "even, warm-up 2")
    for computed, name in schedules.items():
        for depth in depths:
            yield fitted(name, computed, gram, depth, scale, SPREAD)


def step_errors(gram: torch.Tensor, candidate: Candidate) -> tuple[float, ...]:
    """Relative error of the forecast of each step, along an uncached run."""
    errors = [0.0] * len(gram)
    for step, kept in kept_at(candidate.computed, len(gram), candidate.depth):
        weights = candidate.weights[step] or ()
        norm = math.sqrt(max(float(gram[step, step]), 1e-300))
        errors[step] = math.sqrt(squared_error(gram, step, kept[: len(weights)], weights)) / norm
    return tuple(errors)


def table_of(candidate: Candidate, timesteps: Sequence[float]) -> Fitted:
    """A candidate's weights as a forecast."""
    entries = []
    for step, kept in kept_at(candidate.computed, len(timesteps), candidate.depth):
        weights = candidate.weights[step]
        assert weights is not None
        entries.append(Fit(step, kept[: len(weights)], tuple(weights)))
    return Fitted(candidate.depth, tuple(timesteps), tuple(entries))
