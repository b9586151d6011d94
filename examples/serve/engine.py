"""The engine of a replica: one thread has the model and steps all requests; they join and leave in the middle.

submit (any thread) -> StepScheduler -> the engine's thread: one call of the model for the rows that it picks
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import cachepass
from cachepass import serving

sys.path.insert(0, str(Path(__file__).parents[1] / "digits"))
from models import NULL_LABEL, load_dit

CACHE = {"method": "taylorseer", "cache_interval": 3, "disable_cache_before_step": 5, "max_order": 1,
         "cache_identifiers": [r"transformer_blocks\.\d+"]}  # fmt: skip
GUIDANCE = 2.0
ATTEMPTS = 3  # of a step that raises
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Told:
    """What the engine tells of a request: after each step, and at its end."""

    step: int
    steps: int
    image: torch.Tensor | None = None  # [28, 28] in [-1, 1], when the request is over
    error: str | None = None


class Job:
    """One picture in the making: noise of a seed on its way to a digit, and whom to tell.

    Its seed decides everything that is random in it, so any replica makes the same picture of it.
    """

    def __init__(self, label: int, seed: int, steps: int, tell: Callable[[Told], object]) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        sampler = FlowMatchEulerDiscreteScheduler()
        sampler.set_timesteps(steps)
        self.timesteps, self.sigmas = sampler.timesteps, sampler.sigmas
        self.latents = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
        self.labels = torch.tensor([NULL_LABEL, label])
        self.steps, self.tell = steps, tell

    def inputs(self, step: int) -> dict[str, torch.Tensor]:
        """Two rows for a step: unconditional, then conditional."""
        return {
            "hidden_states": self.latents.repeat(2, 1, 1, 1),
            "timestep": self.timesteps[step].repeat(2),
            "class_labels": self.labels,
        }

    def moved(self, step: int, velocity: torch.Tensor) -> torch.Tensor:
        """The latents after a step: guidance, and Euler's step, from the model's output for the two rows."""
        uncond, cond = velocity.chunk(2)
        guided = uncond + GUIDANCE * (cond - uncond)
        return self.latents + (self.sigmas[step + 1] - self.sigmas[step]) * guided

    @property
    def image(self) -> torch.Tensor:
        return self.latents[0, 0].clamp(-1, 1)


class Engine:
    """A cached model, a scheduler, and the thread that they belong to.

    A step of a request is two rows of a call, one for each of its trajectories: a call makes a step of ``max_requests``
    at most, and ``max_active`` have places in the model's pool.
    """

    def __init__(self, *, lowering: str = "specialize", max_requests: int = 4, max_active: int = 8) -> None:
        options: Any = {"cache": CACHE, "lowering": lowering, "progress": False, "pool_requests": 2 * max_active}
        self.model: Any = torch.compile(load_dit(), backend="cached_inductor", fullgraph=True, options=options)
        most = _together([Job(0, seed, 20, print).inputs(0) for seed in range(max_requests)])
        with torch.no_grad(), cachepass.rows(*map(str, range(2 * max_requests))):
            cachepass.warmup(self.model, **most, progress=False)
        self.scheduler = serving.StepScheduler(max_rows=max_requests, max_active=max_active)
        self._numbers = itertools.count(1)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> str:
        """Let a picture be made; its name, for ``cancel``."""
        name = f"request-{next(self._numbers)}"
        phases = serving.phases_of(self.model, job.steps)
        self.scheduler.submit(serving.Request(name, phases, size=tuple(job.latents.shape), payload=job))
        return name

    def cancel(self, name: str) -> None:
        """Nobody waits for this picture any more; nothing happens to one that is made."""
        self.scheduler.cancel(name)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        self.scheduler.close()
        self._thread.join()

    def _run(self) -> None:
        with torch.no_grad():
            while call := self.scheduler.next(timeout=None):
                if call.over:
                    cachepass.release(*call.over)
                if call.rows:
                    self._call(call)

    def _call(self, call: serving.Call) -> None:
        try:
            jobs = self._step(call.rows)
        except Exception as error:
            logger.exception("a step of %s failed", ", ".join(call.names))
            for row in call.rows:
                if row.attempt + 1 >= ATTEMPTS:
                    self.scheduler.cancel(row.name)
                    row.request.payload.tell(Told(row.step, row.request.steps, error=str(error)))
            self.scheduler.failed(call)
            return
        self.scheduler.done(call)
        for row, job in zip(call.rows, jobs, strict=True):
            job.tell(Told(row.step + 1, job.steps, job.image if row.last else None))

    def _step(self, rows: tuple[serving.Row, ...]) -> list[Job]:
        jobs: list[Job] = [row.request.payload for row in rows]
        inputs = _together([job.inputs(row.step) for job, row in zip(jobs, rows, strict=True)])
        with cachepass.rows(*(f"{row.name}/{side}" for row in rows for side in ("uncond", "cond"))):
            velocities = self.model(**inputs).sample.split(2)
        moved = [job.moved(row.step, out) for job, row, out in zip(jobs, rows, velocities, strict=True)]
        for job, latents in zip(jobs, moved, strict=True):  # all or none: a step that raises is made again
            job.latents = latents
        return jobs


def _together(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The inputs of one call for several requests."""
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
