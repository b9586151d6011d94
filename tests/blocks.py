"""Adaptive caching of a stack of blocks, written out on a small model: what the compiled one must equal."""

from __future__ import annotations

from collections.abc import Callable

import torch
from small_models import Transformer

from cachepass.forecast import ForecastRule
from cachepass.schedule import Past, Schedule, Step

Probe = Callable[["BlockCache", torch.Tensor], torch.Tensor]


class BlockCache:
    """``Transformer`` step by step: the blocks from ``first`` on are computed or their residual is forecast."""

    def __init__(
        self,
        model: Transformer,
        schedule: Schedule,
        forecast: ForecastRule,
        *,
        first: int = 1,
        last: int = 0,
        every: bool = False,
        modulated: bool = False,
        residual: bool = True,
    ) -> None:
        self.model, self.schedule, self.forecast = model, schedule, forecast
        self.first, self.end, self.every = first, len(model.blocks) - last, every
        self.modulated, self.residual = modulated, residual
        self.reset()

    def reset(self) -> None:
        self.step, self.kept, self.history = 0, None, []
        self.skipped, self.streak, self.distances, self.measured = 0, 0, [], 0.0
        self.computed, self.seen = [], []

    def __call__(self, x: torch.Tensor, timestep: torch.Tensor, *conditioning: object) -> torch.Tensor:
        model, now = self.model, float(timestep[0])
        if self.schedule.refreshes(self.step):
            computed, seen, step = self.computed, self.seen, self.step
            kept = self.kept
            self.reset()
            self.computed, self.seen, self.step, self.kept = computed, seen, step, kept
        value = x
        for block in model.blocks[: self.first]:
            value = block(value, timestep, *conditioning)
        probe = model.blocks[0].norm(x) if self.modulated else value - x if self.first else value
        predict, distance = self._decide(Step(self.step, now), probe)
        base = value
        if predict:
            value = self._predicted(now) + (base if self.residual else 0)
        else:
            for block in model.blocks[self.first : self.end]:
                value = block(value, timestep, *conditioning)
            self.history.insert(0, (self.step, now, value - base if self.residual else value))
        for block in model.blocks[self.end :]:
            value = block(value, timestep, *conditioning)
        self._note(predict, distance, probe)
        return model.proj_out(value)

    def _decide(self, step: Step, probe: torch.Tensor) -> tuple[bool, float | None]:
        if not self.history:
            return False, None
        past = Past(
            tuple(kept[0] for kept in self.history), self.skipped, self.streak, tuple(self.distances), self.measured
        )
        answer = self.schedule.predicts(step, past)
        if answer is not None or self.kept is None:
            return bool(answer), None
        distance = float((probe - self.kept).abs().mean() / self.kept.abs().mean())
        answer = self.schedule.predicts(step, past, distance)
        return bool(answer), distance

    def _predicted(self, now: float) -> torch.Tensor:
        kept = self.history[: self.forecast.form.history]
        values = [value for _, _, value in kept]
        if not values:
            return torch.zeros_like(self.history[0][2])
        steps = self.forecast.spacing == "step"
        nodes, at = [k[0] if steps else k[1] for k in kept], self.step if steps else now
        gram = None
        if self.forecast.needs_gram:
            flat = torch.stack([value.flatten().double() for value in values])
            gram = flat @ flat.T
        weights = self.forecast.weights(nodes, at, gram)
        return sum(w * value for w, value in zip(weights, values, strict=False))

    def _note(self, predict: bool, distance: float | None, probe: torch.Tensor) -> None:
        self.measured += max(distance or 0.0, 0.0)
        if predict:
            self.skipped, self.streak = self.skipped + 1, self.streak + 1
            self.distances += [] if distance is None else [distance]
        else:
            self.streak, self.distances = 0, []
        if self.every or not predict:
            self.kept = probe
        self.computed.append(not predict)
        self.seen.append(distance)
        self.step += 1
