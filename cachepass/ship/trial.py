"""Trial: an archive runs with random inputs, and each phase is timed."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ..inspect.timeline import even_timesteps
from ..program.phases import phase_name
from ..run.live import programs_of, reset
from .binding import arguments_of
from .load import Archive, load
from .loaded import weights_of
from .manifest import Argument, Form, Size
from .model import LoadedModel

_STEPS = 28


@dataclass(frozen=True)
class Timed:
    """Calls of one phase: how many there were, and the median of what one takes."""

    phase: str
    calls: int
    milliseconds: float


def try_out(
    path: str | Path, weights: str | Path | None = None, *, steps: int | None = None, rounds: int = 3
) -> list[Timed]:
    """Time the phases of an archive in runs with random inputs, after one that does not count.

    Args:
        path: The archive.
        weights: As for ``load``; None: those in the archive, or random ones.
        steps: Of a run; None: those of the archive, or 28.
        rounds: Runs that count.

    Raises:
        ArchiveError: As ``load``.
    """
    archive = Archive(path)
    generator = torch.Generator().manual_seed(0)
    given: object = weights
    if weights is None and not archive.manifest.weights:
        needed = weights_of(archive.manifest.sizes).values()
        given = {weight.name: 0.02 * _random(weight.form, generator) for weight in needed if weight.kind != "constant"}
    model = load(path, given)
    size = archive.manifest.sizes[0]
    scale = archive.manifest.settings.timestep_scale or 1.0
    steps = steps or archive.manifest.settings.num_inference_steps or _STEPS
    times: dict[str, list[float]] = {}
    for counts in (False, *(True,) * rounds):
        for phase, seconds in _run(model, size, steps, scale, generator):
            if counts:
                times.setdefault(phase, []).append(seconds)
        reset(model)
    return [Timed(phase, len(found), 1000 * statistics.median(found)) for phase, found in times.items()]


def _run(
    model: LoadedModel, size: Size, steps: int, scale: float, generator: torch.Generator
) -> list[tuple[str, float]]:
    """The phase of each call of one run, and its seconds."""
    given: dict[Argument, torch.Tensor] = {one: _random(one.form, generator) for one in size.arguments}
    latents = [size.inputs[i] for i in size.layout.latents]
    at = None if size.layout.timestep is None else size.inputs[size.layout.timestep]
    found = []
    for timestep in even_timesteps(steps):
        for argument in latents:
            assert isinstance(argument, Argument)
            given[argument] = _random(argument.form, generator)
        if isinstance(at, Argument):
            given[at] = torch.full(at.form.shape, timestep / scale).to(at.form.device, at.form.dtype)
        before = _counts(model)
        start = time.perf_counter()
        model(**arguments_of({**dict(size.fixed), **{one.path: _given(one, value) for one, value in given.items()}}))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        phases = [name for name, count in _counts(model).items() if count > before.get(name, 0)]
        found.append((phases[0] if phases else "plain", seconds))
    return found


def _given(argument: Argument, value: torch.Tensor) -> object:
    return value.item() if argument.number else value


def _counts(model: LoadedModel) -> dict[str, int]:
    counts: dict[str, int] = {}
    for dispatcher, instance in programs_of(model):
        assert dispatcher.program is not None
        for phase, count in instance.phases.items():
            name = phase_name(phase, dispatcher.program.plan.groups)
            counts[name] = counts.get(name, 0) + count
    return counts


def _random(form: Form, generator: torch.Generator) -> torch.Tensor:
    if form.dtype.is_floating_point:
        return torch.randn(form.shape, generator=generator).to(form.device, form.dtype)
    return torch.zeros(form.shape, dtype=form.dtype, device=form.device)
