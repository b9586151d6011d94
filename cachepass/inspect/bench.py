"""``cachepass bench``: a user's model with caches against plain Inductor, on the user's machine.

Every subject makes whole runs, in turn, so that what else happens on the machine meets all of them; ratios are taken
within a round, and everything reported is a median. Quality is not looked at: latents are noise that drifts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..capture.inputs import find_latents, find_timestep_input
from ..config import MethodConfig
from ..errors import OptionError, TimestepError, listing
from ..options import parse_options
from ..run.live import reset
from .summary import Summary, summary
from .tables import human_bytes, table

PLAIN = "plain Inductor"


@dataclass(frozen=True)
class Measured:
    """One subject's figures: seconds, medians over rounds. Ratios are to plain Inductor's within the same round.

    Attributes:
        name: ``"plain Inductor"``, or the method's.
        computed, predicted: A step of the kind; None: no step was. Of a run without any prediction all are computed;
            FasterCache's steps at half batch count as predicted.
        run: All steps.
        speedup: Plain run over this one's.
        compile: The first run less a later one.
        steps: Computed and predicted steps in a run.
        cache_bytes: Of all slots.
    """

    name: str
    computed: float | None
    predicted: float | None
    run: float
    speedup: float
    compile: float
    steps: tuple[int, int]
    cache_bytes: int


@dataclass
class _Subject:
    name: str
    call: Callable[..., Any]
    cached: bool
    runs: list[list[tuple[bool, float]]] = field(default_factory=list)  # of every step: predicted?, seconds

    def summary(self) -> Summary | None:
        return summary(self.call) if self.cached else None


def bench(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    caches: Sequence[MethodConfig],
    *,
    steps: int = 28,
    rounds: int = 5,
    options: Mapping[str, Any] | None = None,
    advance: Callable[[str], None] | None = None,
) -> list[Measured]:
    """Measure a model without and with each of the caches.

    Args:
        model: In evaluation mode, on its device.
        inputs: Keyword arguments of one call. Its timestep goes down evenly from what it is to just above 0.
        caches: Configs.
        steps: Of a run.
        rounds: Runs of each subject that count, after the first one, in which it is compiled.
        options: Further options of the backend, for all of them (Inductor's, for plain Inductor too).
        advance: Called after each run with the subject's name, for a progress bar.

    Raises:
        TimestepError: No input is called as timesteps are.
        OptionError: Fewer than two steps, or no round.
    """
    if steps < 2 or rounds < 1:
        raise OptionError(f"{steps} steps in {rounds} rounds", where="bench", hint="at least two steps and one round")
    trajectory = _trajectory(inputs, steps, options)
    subjects = [
        _Subject(PLAIN, torch.compile(model, fullgraph=True, options=parse_options(options).inductor), cached=False)
    ]
    for cache in caches:
        given: dict[str, Any] = {**(options or {}), "cache": cache, "num_inference_steps": steps}
        compiled = torch.compile(model, backend="cached_inductor", fullgraph=True, options=given)
        subjects.append(_Subject(cache.label, compiled, cached=True))
    with torch.no_grad():
        for _ in range(1 + rounds):
            for subject in subjects:
                subject.runs.append(_run(subject, trajectory))
                if advance is not None:
                    advance(subject.name)
    return [_figures(subject, subjects[0]) for subject in subjects]


def _trajectory(inputs: Mapping[str, Any], steps: int, options: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The inputs of every step: the timestep goes down, the latents drift; all others are the same objects."""
    name = find_timestep_input(dict(inputs), (options or {}).get("timestep_input"))
    if name is None:
        raise TimestepError(
            "no input is called timestep, timesteps, t or sigma",
            where="bench",
            hint=f'give options["timestep_input"]. inputs: {listing(inputs)}',
        )
    names, values = list(inputs), list(inputs.values())
    latents = [names[i] for i in find_latents(names, values)]
    generator = torch.Generator().manual_seed(0)
    result = []
    for step in range(steps):
        call, left, first = dict(inputs), (steps - step) / steps, inputs[name]
        call[name] = (first * left).to(first.dtype) if torch.is_tensor(first) else type(first)(first * left)
        for latent in latents:
            value = inputs[latent]
            if latent != name and torch.is_tensor(value) and value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
                call[latent] = value * left + 0.05 * noise
        result.append(call)
    return result


def _run(subject: _Subject, trajectory: Sequence[Mapping[str, Any]]) -> list[tuple[bool, float]]:
    devices = {v.device.type for call in trajectory[:1] for v in call.values() if torch.is_tensor(v)} - {"cpu", "meta"}
    wait = torch.accelerator.synchronize if devices else lambda: None
    times = []
    if subject.runs and subject.cached:
        reset(subject.call)
    predictions = _predictions(subject) if subject.runs else 0
    for call in trajectory:
        wait()
        start = time.perf_counter()
        subject.call(**call)
        wait()
        seconds = time.perf_counter() - start
        before, predictions = predictions, _predictions(subject)
        times.append((predictions > before, seconds))
    return times


def _predictions(subject: _Subject) -> int:
    found = subject.summary()
    return 0 if found is None else sum(found.predicted.values())


def _figures(subject: _Subject, plain: _Subject) -> Measured:
    first, *runs = subject.runs
    totals = [sum(seconds for _, seconds in run) for run in runs]
    plain_totals = [sum(seconds for _, seconds in run) for run in plain.runs[1:]]
    kinds = {
        kind: [seconds for run in runs for predicted, seconds in run if predicted is kind] for kind in (False, True)
    }
    found = subject.summary()
    return Measured(
        name=subject.name,
        computed=statistics.median(kinds[False]) if kinds[False] else None,
        predicted=statistics.median(kinds[True]) if kinds[True] else None,
        run=statistics.median(totals),
        speedup=statistics.median(a / b for a, b in zip(plain_totals, totals, strict=True)),
        compile=max(0.0, sum(seconds for _, seconds in first) - statistics.median(totals)),
        steps=(len(kinds[False]) // len(runs), len(kinds[True]) // len(runs)),
        cache_bytes=0 if found is None else found.cache_bytes,
    )


def as_table(rows: Sequence[Measured]) -> str:
    """The figures for people."""
    columns = ("", "computed ms", "predicted ms", "run ms", "speedup", "computed + predicted", "compile s", "cache")
    return table(
        columns,
        [
            (
                row.name,
                _milliseconds(row.computed),
                _milliseconds(row.predicted),
                _milliseconds(row.run),
                f"{row.speedup:.2f}x",
                f"{row.steps[0]} + {row.steps[1]}",
                f"{row.compile:.1f}",
                human_bytes(row.cache_bytes),
            )
            for row in rows
        ],
    )


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.2f}"
