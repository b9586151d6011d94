"""Player: the user's sampling loop, with any schedule and any weights, from one capture.

A schedule and its weights are host data, so trying another one costs a run and no compilation: the compiled model asks
a :class:`Slate`, and what stands on it changes between runs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import _torch
from ..config.base import RecipeConfig
from ..config.tuned import parts_of
from ..errors import OptionError
from ..inspect.results import as_tensor, relative_error
from ..inspect.summary import Summary, summary
from ..program.progress import shown_elsewhere
from ..recipe.cut import Cut
from ..recipe.forecast import Forecast, ForecastRule
from ..recipe.recipe import Group, Part, Recipe
from ..recipe.schedule import Past, Schedule, Step
from ..recipe.vocabulary import Region
from ..run.live import ENABLED, denoiser_of, denoisers_of, forget, original_of, reset, standing_in
from ..run.runs import Run
from ..run.state import RunState
from ..run.watch import WATCHER
from .fitting import Weights
from .gram import gram, sketch

GROUP = "tuned"
_MOST_CUTS = 8  # captures of one model at once
_MOST_DECIBELS = 150.0  # of equal results
_ALIKE = 1e-3  # relative error of two uncached runs: kernels of a GPU may add in another order


class Slate:
    """The weights that count now, by step; None: the step is computed, as all are behind the end."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.weights: Sequence[Weights | None] = ()
        self.parts: tuple[str, str] = ("", "")  # of the model: what it consists of, and a digest of that

    def at(self, step: float) -> Weights | None:
        index = int(step)
        return self.weights[index] if index < len(self.weights) else None


@dataclass(frozen=True, eq=False)
class _Slated(Schedule):
    """Predicts where the slate has weights."""

    slate: Slate

    @property
    def looks_back(self) -> bool:
        return False

    def predicts(self, step: Step, past: Past, distance: float | None = None) -> bool | None:  # noqa: ARG002
        return self.slate.at(step.index) is not None

    def never_predicts(self, num_inference_steps: int | None) -> str | None:  # noqa: ARG002 (it will, in another run)
        return None

    def __str__(self) -> str:
        return "what is being tried"


@dataclass(frozen=True, eq=False)
class _SlateWeights(ForecastRule):
    """The slate's weights."""

    slate: Slate

    @property
    def form(self) -> Forecast:
        return Forecast(f"tried({self.slate.depth})", history=self.slate.depth)

    def derive(self, nodes: tuple[float, ...], at: float) -> Sequence[float]:  # noqa: ARG002
        weights = self.slate.at(at) or (1.0,)
        return (*weights, *(0.0 for _ in range(self.slate.depth - len(weights))))

    def weights(self, nodes: Sequence[float], at: float, gram: object = None) -> tuple[float, ...]:  # noqa: ARG002
        return tuple(self.derive(tuple(nodes), at))


@dataclass(frozen=True)
class _Trying(RecipeConfig):
    """The recipe that asks a slate; what the model consists of is written on it."""

    slate: Slate

    def review(self, regions: Sequence[Region]) -> None:
        self.slate.parts = parts_of(regions)

    def why_idle(self, recipe: Recipe, timesteps: tuple[float, float] | None) -> str | None:  # noqa: ARG002
        return None


@dataclass
class Recording:
    """What a run was made of.

    Attributes:
        gram: Inner products of what the cut was worth in its steps, over all trajectories; ``[n, n]``.
        timesteps: Of its steps, in the unit of 1000 to 0.
        trajectories: Their number: 2 for guidance by two calls.
        numbers: Of one step's values, in one trajectory.
        slot_bytes: What is kept of one output, in each trajectory.
    """

    gram: torch.Tensor
    timesteps: tuple[float, ...]
    trajectories: int
    numbers: int
    slot_bytes: int


@dataclass
class _Recorder:
    """Takes a sketch of what each step computed."""

    vectors: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # of each graph in each trajectory
    timesteps: dict[int, float | None] = field(default_factory=dict)
    contexts: set[int] = field(default_factory=set)
    planned: dict[int, int] = field(default_factory=dict)  # bytes, of each graph in each trajectory
    numbers: int = 0
    depth: int = 1

    def saw(self, run: Run, state: RunState, step: Step) -> None:
        values = state.newest(GROUP)
        if not values:
            return
        self.numbers = max(self.numbers, sum(value.numel() for value in values))
        self.vectors.setdefault(id(state), []).append(sketch(values))
        self.timesteps[step.index] = step.timestep
        self.contexts.add(id(run))
        self.planned[id(state)] = state.planned_bytes

    def recording(self) -> Recording:
        steps = max((len(vectors) for vectors in self.vectors.values()), default=0)
        timesteps = [self.timesteps.get(step) for step in range(steps)]
        known = tuple(timestep for timestep in timesteps if timestep is not None)
        whole = [vectors for vectors in self.vectors.values() if len(vectors) == steps]
        if not whole or len(known) < steps:
            raise OptionError(
                "nothing was recorded" if not whole else "the timestep of its steps is not known",
                where="tune",
                hint="the sampling loop must call the model that it is given"
                if not whole
                else 'name the input that holds it: options={"timestep_input": ...}',
            )
        total = torch.stack([gram(vectors) for vectors in whole]).sum(0)
        slot_bytes = sum(self.planned.values()) // (self.depth * len(self.contexts))
        return Recording(total, known, len(self.contexts), self.numbers, slot_bytes)


@dataclass(frozen=True)
class Played:
    """One run of the loop.

    Attributes:
        returned: What the loop returned.
        result: The same as numbers.
        share: FLOPs of the run, as a share of an uncached one's; None: unknown.
        recording: If it was asked for.
    """

    returned: Any
    result: torch.Tensor
    share: float | None
    recording: Recording | None = None


class Player:
    """Runs a user's loop with what stands on a slate.

    Args:
        model: A module that is not compiled, or a pipeline with one denoiser.
        sample: ``sample(model, run)``: one whole generation, of the seed or prompt number ``run``.
        cut: Where.
        depth: The most outputs that a candidate keeps.
        options: Of the backend.
    """

    def __init__(
        self, model: Any, sample: Callable[[Any, int], Any], cut: Cut, depth: int, options: Mapping[str, Any]
    ) -> None:
        self.model, self.sample, self.cut, self.depth = model, sample, cut, depth
        self.slate = Slate(depth)
        module = _uncompiled(model)
        part = Part(cut, _SlateWeights(self.slate))
        recipe = Recipe((Group(GROUP, _Slated(self.slate), (part,)),))
        given: Any = {**options, "cache": _Trying(recipe, self.slate), "progress": False}
        self.compiled: Any = torch.compile(module, backend="cached_inductor", options=given)
        pipeline = denoisers_of(model)
        self._parts = {"" if pipeline is None else next(iter(pipeline)): self.compiled}
        self._flops: tuple[int | None, int | None] = (0, 0)

    def play(self, weights: Sequence[Weights | None], run: int, *, record: bool = False) -> Played:
        """One generation. The random numbers of torch's default generator are those of ``run``."""
        self.slate.weights = tuple(weights)
        recorder = _Recorder(depth=self.depth) if record else None
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.random.fork_rng())
            stack.enter_context(shown_elsewhere())
            stack.enter_context(_torch.many_captures(_MOST_CUTS))
            target = stack.enter_context(standing_in(self.model, self._parts))
            torch.manual_seed(run)
            if recorder is not None:
                token = WATCHER.set(recorder)
                stack.callback(WATCHER.reset, token)
            returned = self.sample(target, run)
            result = as_tensor(returned)
        recording = None if recorder is None else recorder.recording()
        reset(self.compiled)
        return Played(returned, result, self._share(), recording)

    def _share(self) -> float | None:
        found = self.summary()
        before, self._flops = self._flops, (found.flops, found.plain_flops)
        now: Any = self._flops
        if None in (*before, *now):
            return None
        taken, plain = (new - old for new, old in zip(now, before, strict=True))  # pyright: ignore[reportOperatorIssue]
        return taken / plain if plain else None

    def summary(self) -> Summary:
        """Of what was done so far."""
        return summary(self.compiled)

    def close(self) -> None:
        """Free what is kept; the programs stay, as those of all captures of a model go together."""
        forget(self.compiled)


def _uncompiled(model: Any) -> torch.nn.Module:
    """The module itself.

    Raises:
        OptionError: A cache is on in it, or it is compiled in place.
    """
    module: Any = original_of(denoiser_of(model))
    if getattr(module, ENABLED, None) is not None or getattr(module, "is_cache_enabled", False):
        raise OptionError("a cache is on", where="tune.model", hint="call disable_cache first")
    if getattr(module, "_compiled_call_impl", None) is not None:
        raise OptionError(
            f"{type(module).__name__} is compiled in place", where="tune.model", hint="give it as it was before"
        )
    return module


def decibels(found: torch.Tensor, expected: torch.Tensor) -> float:
    """PSNR of a result: the mean over its samples (of images in dimension 0), with the range of all as the peak."""
    if found.shape != expected.shape:
        raise OptionError(
            f"the loop returned the shape {tuple(found.shape)}, and {tuple(expected.shape)} for the same run before",
            where="tune",
            hint="sample(model, run) must do the same for the same run",
        )
    peak = float(expected.max() - expected.min())
    samples = zip(found, expected, strict=True) if expected.ndim >= 4 else [(found, expected)]
    values = []
    for sample, original in samples:
        error = float((sample.double() - original.double()).square().mean())
        if not math.isfinite(error):
            return -math.inf
        values.append(_MOST_DECIBELS if error == 0 or peak == 0 else 10 * math.log10(peak**2 / error))
    return sum(min(value, _MOST_DECIBELS) for value in values) / len(values)


def are_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Two uncached results of one run: the loop is deterministic."""
    return one.shape == other.shape and relative_error(other, one) <= _ALIKE
