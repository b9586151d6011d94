"""The methods by definition, slowly: on the eager model, every output kept, finite differences taken step by step.

An oracle that knows nothing of graphs, slots or weights, for models that no other library caches.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass
class TaylorSeer:
    """Forecast by finite differences: ``f_0`` is the output, ``f_{j+1} = (f_j - previous f_j) / gap``."""

    interval: int
    before: int
    order: int
    after: int | None = None

    def predicts(self, step: int, timestep: float) -> bool:
        computes = step < self.before or (step - self.before - 1) % self.interval == 0
        return not computes and not (self.after is not None and step >= self.after)

    def forecast(self, outputs: list[tuple[int, Any]], step: int) -> Any:
        """``outputs``: (step, tensors) of every computed step, oldest first."""
        factors: list[list[torch.Tensor]] = []
        last = None
        for at, tensors in outputs:
            new = [tensors]
            for j in range(self.order):
                if last is None or j >= len(factors):
                    break
                new.append([(a - b) / (at - last) for a, b in zip(new[j], factors[j], strict=True)])
            factors, last = new, at
        return [
            sum(factors[j][i] * (step - last) ** j / math.factorial(j) for j in range(len(factors)))
            for i in range(len(factors[0]))
        ]


@dataclass
class Broadcast:
    """Pyramid Attention Broadcast of one kind: the last output, on ``skip_range - 1`` of ``skip_range`` steps."""

    skip_range: int
    low: float
    high: float

    def predicts(self, step: int, timestep: float) -> bool:
        return step > 0 and self.low < timestep < self.high and step % self.skip_range != 0

    def forecast(self, outputs: list[tuple[int, Any]], step: int) -> Any:
        return outputs[-1][1]


@dataclass
class State:
    """One run: its steps, and every output of every module in it."""

    step: int = 0
    last: float | None = None
    kept: dict[tuple[str, int], list[tuple[int, Any]]] = field(default_factory=dict)


class Reference:
    """A model whose named modules are forecast. ``model(x, timestep, ...)`` as the compiled one is called.

    ``predicted``: calls so far in which a module was forecast.
    """

    def __init__(self, model: torch.nn.Module, method: Any, paths: list[str]) -> None:
        self.model, self.method = model, method
        self.states: dict[object, State] = {}
        self.state, self.timestep = State(), 0.0
        self.calls: dict[str, int] = {}
        self.structures: dict[tuple[str, int], Any] = {}
        self.predicted, self._forecast = 0, False
        for path in paths:
            module = model.get_submodule(path)
            module.forward = self._cached(path, module.forward)

    def _cached(self, path: str, forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            occurrence = self.calls.get(path, 0)
            self.calls[path] = occurrence + 1
            outputs = self.state.kept.setdefault((path, occurrence), [])
            if outputs and self.method.predicts(self.state.step, self.timestep):
                self._forecast = True
                # Only tensors are forecast, so the structure of what the module returns is that of a computed step.
                leaves, spec = pytree.tree_flatten(self.structures[path, occurrence])
                return pytree.tree_unflatten(self.method.forecast(outputs, self.state.step), spec)
            result = forward(*args, **kwargs)
            leaves, _ = pytree.tree_flatten(result)
            outputs.append((self.state.step, [leaf.clone() for leaf in leaves]))
            self.structures[path, occurrence] = pytree.tree_map(lambda leaf: leaf.clone(), result)
            return result

        return call

    def __call__(self, context: str, x: torch.Tensor, timestep: torch.Tensor, *conditioning: Any) -> torch.Tensor:
        return self.step((context, tuple(x.shape)), float(timestep.max()), x, timestep, *conditioning)

    def step(self, key: object, now: float, *args: Any, **kwargs: Any) -> Any:
        """A call of the model, at the timestep ``now``: a step of the run of ``key``."""
        state = self.states.setdefault(key, State())
        if state.last is not None and now > state.last:
            state.step, state.kept = 0, {}
        self.state, self.timestep, self.calls, self._forecast = state, now, {}, False
        result = self.model(*args, **kwargs)
        state.step, state.last = state.step + 1, now
        self.predicted += self._forecast
        return result

    def reset(self) -> None:
        self.states.clear()


def twin(model: torch.nn.Module) -> torch.nn.Module:
    """The same weights in other memory."""
    return copy.deepcopy(model)


class FasterCache:
    """FasterCache by its definition, on the eager model: complex spectra, every output kept in a list."""

    def __init__(self, model, config, kinds):
        """``kinds``: path of each module that is forecast -> its kind."""
        self.model, self.config, self.half, self.alone = model, config, False, False
        self.kept = {path: [] for path in kinds}
        for path, kind in kinds.items():
            module = model.get_submodule(path)
            module.forward = self._cached(module.forward, path, *config.kind(kind)[:2])
        self.start()

    def start(self):
        self.step, self.weights, self.spectrum = 0, (1.0, 1.0), None
        for outputs in self.kept.values():
            outputs.clear()

    def _cond(self, value):
        first, second = value[: len(value) // 2], value[len(value) // 2 :]
        return second if self.config.unconditional_first else first

    def _cached(self, forward, path, skip_range, bounds):
        def call(*args, **kwargs):
            kept = self.kept[path]
            if kept and (self.half or self.alone) and bounds[0] < self.now < bounds[1] and self.step % skip_range:
                new, old = kept[-1], kept[-2] if len(kept) > 1 else kept[-1]
                output = tuple(a + 0.5 * (a - b) for a, b in zip(new, old, strict=True))
                kept.append(output)
                return output if self.tuples[path] else output[0]
            output = forward(*args, **kwargs)
            self.tuples[path] = isinstance(output, tuple)
            values = output if isinstance(output, tuple) else (output,)
            kept.append(tuple(v if self.half or self.alone else self._cond(v) for v in values))
            return output

        self.tuples = {}
        return call

    def __call__(self, now, batch, *, alone=False, **kwargs):
        """``alone``: the batch is the conditional half, because there is no guidance in this step."""
        config, self.now, self.alone = self.config, now, alone
        low, high = config.unconditional_batch_timestep_skip_range
        skips = low < now < high and self.step % config.unconditional_batch_skip_range != 0
        self.half = not alone and self.spectrum is not None and skips
        if self.half:
            kwargs = {k: self._halved(k, v, batch) for k, v in kwargs.items()}
        output = self.model(**kwargs)
        output = output[0] if isinstance(output, (tuple, dict)) else output.sample
        listed = isinstance(output, list)
        output = torch.stack(output) if listed else output
        if self.half:
            first = config.unconditional_first
            estimate = self._estimate(output)
            output = torch.cat([estimate, output] if first else [output, estimate])
        elif not alone:
            cond = self._cond(output)
            uncond = output[: len(cond)] if config.unconditional_first else output[len(cond) :]
            self.spectrum, self.weights = self._spectrum(uncond) - self._spectrum(cond), (1.0, 1.0)
        self.step += 1
        return output

    def _halved(self, name, value, batch):
        sized = isinstance(value, (torch.Tensor, list)) and len(value) == batch
        return self._cond(value) if sized and name in self.config.guided_inputs else value

    def _planes(self, x):
        grid = self.config.latent_grid
        return x if grid is None else x.transpose(1, 2).unflatten(-1, grid)

    def _spectrum(self, x):
        return torch.fft.fftshift(torch.fft.fft2(self._planes(x)), dim=(-2, -1))

    def _estimate(self, cond):
        config, (a, b) = self.config, self.weights
        ranges = config.low_frequency_weight_update_timestep_range, config.high_frequency_weight_update_timestep_range
        a *= config.alpha_low_frequency if ranges[0][0] < self.now < ranges[0][1] else 1.0
        b *= config.alpha_high_frequency if ranges[1][0] < self.now < ranges[1][1] else 1.0
        self.weights = a, b
        height, width = self.spectrum.shape[-2:]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        disc = (y - height // 2) ** 2 + (x - width // 2) ** 2 <= (min(height, width) // 5) ** 2
        difference = torch.where(disc, a * self.spectrum, b * self.spectrum)
        planes = torch.fft.ifft2(torch.fft.ifftshift(difference, dim=(-2, -1))).real
        return cond + (planes if config.latent_grid is None else planes.flatten(2).transpose(1, 2))
