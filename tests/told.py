"""The slow reference that is told its trajectories: one oracle for each, on an uncompiled copy of the model.

What a compiled model must find out - which call goes on from which - is an argument here. So nothing of how it finds
out (contexts, timesteps, identities of tensors, threads) is repeated, and nothing can be wrong in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from blocks import BlockCache
from reference import Broadcast, Reference, State, TaylorSeer, twin
from small_models import Guided

from cachepass.forecast import Reuse
from cachepass.schedule import Threshold


class Oracle(Protocol):
    """One trajectory under one method."""

    @property
    def predicted(self) -> int:
        """Steps so far in which something was predicted."""
        ...

    step: int  # the next one of its run

    def __call__(self, *inputs: Any) -> torch.Tensor: ...


class Told:
    """A model's trajectories by name, each with an oracle that only its own calls reach."""

    def __init__(self, make: Callable[[], Oracle]) -> None:
        self._make = make
        self._trajectories: dict[str, Oracle] = {}
        self._over = 0

    def call(self, trajectory: str, *inputs: Any, step: int | None = None) -> torch.Tensor:
        """The next step of a trajectory; of a name that was not heard before, or that ended, the first.

        ``step``: of its run, where others were made by another trajectory in between.
        """
        if trajectory not in self._trajectories:
            self._trajectories[trajectory] = self._make()
        oracle = self._trajectories[trajectory]
        if step is not None:
            oracle.step = step
        return oracle(*inputs)

    def end(self, trajectory: str) -> None:
        """The next call by this name begins another trajectory."""
        self._over += self._trajectories.pop(trajectory).predicted

    @property
    def predicted(self) -> int:
        """Steps in which something was predicted, of all trajectories."""
        return self._over + sum(oracle.predicted for oracle in self._trajectories.values())


class Forecasts:
    """TaylorSeer or Pyramid Attention Broadcast of some modules, by definition."""

    def __init__(self, model: torch.nn.Module, method: TaylorSeer | Broadcast, paths: list[str]) -> None:
        self._reference = Reference(twin(model), method, paths)
        self._state = self._reference.states[""] = State()

    @property
    def predicted(self) -> int:
        return self._reference.predicted

    @property
    def step(self) -> int:
        return self._state.step

    @step.setter
    def step(self, step: int) -> None:
        self._state.step = step

    def __call__(self, *inputs: Any) -> torch.Tensor:
        return self._reference.step("", float(inputs[1].max()), *inputs)


class FirstBlock(BlockCache):
    """First-block cache: the blocks behind the first, unless its residual is far from the last computed step's."""

    @property
    def predicted(self) -> int:
        return self.computed.count(False)


INTERVAL, BEFORE, SKIP_RANGE, RANGE, NEAR = 3, 2, 2, (100, 800), 0.11
CACHES: dict[str, dict[str, Any]] = {
    "taylorseer": {
        "method": "taylorseer",
        "cache_interval": INTERVAL,
        "disable_cache_before_step": BEFORE,
        "max_order": 1,
        "taylor_factors_dtype": None,
        "cache_identifiers": [r".*\.attn", r".*\.ff"],
    },
    "pab": {
        "method": "pab",
        "spatial_attention_block_skip_range": SKIP_RANGE,
        "spatial_attention_timestep_skip_range": RANGE,
    },
    "first_block_cache": {"method": "first_block_cache", "threshold": NEAR},
}


def told(model: Guided, cache: str) -> Told:
    """The reference of a small model under one of :data:`CACHES`."""
    of_blocks = {name: [f"blocks.{i}.{name}" for i in range(len(model.blocks))] for name in ("attn", "ff")}
    oracles: dict[str, Callable[[], Oracle]] = {
        "taylorseer": lambda: Forecasts(model, TaylorSeer(INTERVAL, BEFORE, 1), of_blocks["attn"] + of_blocks["ff"]),
        "pab": lambda: Forecasts(model, Broadcast(SKIP_RANGE, *RANGE), of_blocks["attn"]),
        "first_block_cache": lambda: FirstBlock(twin(model), Threshold(NEAR, inclusive=True), Reuse()),
    }
    return Told(oracles[cache])
