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
    """A model whose named modules are forecast. ``model(x, timestep)`` as the compiled one is called."""

    def __init__(self, model: torch.nn.Module, method: Any, paths: list[str]) -> None:
        self.model, self.method = model, method
        self.states: dict[object, State] = {}
        self.state, self.timestep = State(), 0.0
        self.calls: dict[str, int] = {}
        for path in paths:
            module = model.get_submodule(path)
            module.forward = self._cached(path, module.forward)

    def _cached(self, path: str, forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            occurrence = self.calls.get(path, 0)
            self.calls[path] = occurrence + 1
            outputs = self.state.kept.setdefault((path, occurrence), [])
            if outputs and self.method.predicts(self.state.step, self.timestep):
                # Only tensors are forecast, so the structure of what the module returns is that of a computed step.
                leaves, spec = pytree.tree_flatten(self.structures[path, occurrence])
                return pytree.tree_unflatten(self.method.forecast(outputs, self.state.step), spec)
            result = forward(*args, **kwargs)
            leaves, _ = pytree.tree_flatten(result)
            outputs.append((self.state.step, [leaf.clone() for leaf in leaves]))
            self.structures[path, occurrence] = pytree.tree_map(lambda leaf: leaf.clone(), result)
            return result

        return call

    structures: dict[tuple[str, int], Any]

    def __call__(self, context: str, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        now = float(timestep.max())
        self.structures = getattr(self, "structures", {})
        state = self.states.setdefault((context, tuple(x.shape)), State())
        if state.last is not None and now > state.last:
            state.step, state.kept = 0, {}
        self.state, self.timestep, self.calls = state, now, {}
        result = self.model(x, timestep)
        state.step, state.last = state.step + 1, now
        return result

    def reset(self) -> None:
        self.states.clear()


def twin(model: torch.nn.Module) -> torch.nn.Module:
    """The same weights in other memory."""
    return copy.deepcopy(model)
