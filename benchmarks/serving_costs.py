"""What a server's calls cost, measured from the real programs; each way of serving in a process of its own.

The processes take turns, one round of each after the other, so that what else the machine does falls on all of them.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from shapes import SHAPES, build, step_inputs, timestep_of
from worker import KEEP_FREED, pay_once, quiet

import cachepass
from cachepass import serving

STEPS = 12  # of the runs that are measured: every phase several times
CACHE = {"method": "taylorseer", "cache_interval": 4, "disable_cache_before_step": 2, "max_order": 1,
         "cache_identifiers": [r"transformer_blocks\.\d+"]}  # fmt: skip
#: Ways to serve: without a cache in batches, each request in a context of its own, and as rows.
WAYS = ("plain", "alone", "rows")
Times = dict[tuple[str, int], list[float]]  # by phase and rows
Table = dict[str, dict[int, float]]


@dataclass(frozen=True)
class Served:
    """A model to serve: how it is built, what it is, and the inputs of one step of so many requests."""

    build: Callable[[], torch.nn.Module]
    about: str
    inputs: Callable[[int, int], dict[str, torch.Tensor]]


def _digits() -> torch.nn.Module:
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))
    from models import load_dit

    return load_dit()


def _digits_inputs(step: int, rows: int) -> dict[str, torch.Tensor]:
    latents = torch.randn(rows, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    return {
        "hidden_states": latents * (1 - 0.4 * step / STEPS),
        "timestep": torch.full((rows,), timestep_of(step, STEPS)),
        "class_labels": torch.arange(rows) % 10,
    }


def _dit_inputs(step: int, rows: int) -> dict[str, torch.Tensor]:
    one = step_inputs("dit", step, STEPS, "cpu", torch.float32)
    return {name: torch.cat([value] * rows) for name, value in one.items()}


MODELS = {
    "digits": Served(_digits, "128 wide, 10 blocks, 49 tokens", _digits_inputs),
    "dit": Served(lambda: build("dit", "cpu", torch.float32), SHAPES["dit"].about, _dit_inputs),
}


def call_rows(model: Any, names: tuple[str, ...], inputs: dict[str, torch.Tensor]) -> Any:
    """One step of several requests."""
    with cachepass.rows(*names):
        return model(**inputs)


def call_alone(model: Any, names: tuple[str, ...], inputs: dict[str, torch.Tensor]) -> Any:
    """One step of one request."""
    (name,) = names
    with cachepass.cache_context(name):
        return model(**inputs)


class Way:
    """One way to serve a model, compiled, and its rounds."""

    def __init__(self, way: str, name: str, sizes: tuple[int, ...]) -> None:
        self.way, self.served = way, MODELS[name]
        self.sizes = (1,) if way == "alone" else sizes
        model, self.rounds = self.served.build(), 0
        if way == "plain":
            self.model: Any = torch.compile(model, fullgraph=True, dynamic=False)
        else:
            options: dict[str, Any] = {"cache": CACHE, "progress": False}
            self.model = torch.compile(model, backend="cached_inductor", fullgraph=True, options=options)
        self.round()  # compiles

    def phases(self, lengths: tuple[int, ...]) -> dict[int, tuple[str, ...]]:
        """What the steps of runs of these lengths do."""
        if self.way == "plain":
            return {length: ("#",) * length for length in lengths}
        return {length: serving.phases_of(self.model, length) for length in lengths}

    def round(self) -> Times:
        """A run with each number of rows; the seconds of its steps."""
        times: Times = {}
        marks = self.phases((STEPS,))[STEPS] if self.rounds or self.way == "plain" else ("",) * STEPS
        for rows in self.sizes:
            names = tuple(f"{self.rounds}-{rows}-{row}" for row in range(rows))
            for step in range(STEPS):
                inputs = self.served.inputs(step, rows)
                start = time.perf_counter()
                self._call(names, inputs)
                times.setdefault((marks[step], rows), []).append(time.perf_counter() - start)
            self._free(names)
        self.rounds += 1
        return times

    def _call(self, names: tuple[str, ...], inputs: dict[str, torch.Tensor]) -> None:
        if self.way == "plain":
            self.model(**inputs)
        else:
            (call_rows if self.way == "rows" else call_alone)(self.model, names, inputs)

    def _free(self, names: tuple[str, ...]) -> None:
        for name in names if self.way == "rows" else ():
            cachepass.release(name)
        for name in names if self.way == "alone" else ():
            cachepass.reset(self.model, context=name)


def worker(pipe: Connection, way: str, model: str, sizes: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    """Answers each "round" with its times; what the steps of runs will do is said first."""
    quiet()
    with torch.no_grad():
        pay_once("cpu")
        served = Way(way, model, sizes)
        pipe.send(served.phases(lengths))
        while pipe.recv() == "round":
            pipe.send(served.round())


@dataclass(frozen=True)
class Costs:
    """What was measured of a model: for each way seconds by phase and rows, and what the steps of runs do."""

    tables: dict[str, Table]
    phases: dict[str, dict[int, tuple[str, ...]]]

    def as_json(self) -> dict[str, Any]:
        phases = {way: {n: list(marks) for n, marks in runs.items()} for way, runs in self.phases.items()}
        return {"seconds": self.tables, "phases": phases}

    @staticmethod
    def from_json(saved: dict[str, Any]) -> Costs:
        tables = {
            way: {phase: {int(rows): cost for rows, cost in by_rows.items()} for phase, by_rows in table.items()}
            for way, table in saved["seconds"].items()
        }
        phases = {way: {int(n): tuple(marks) for n, marks in runs.items()} for way, runs in saved["phases"].items()}
        return Costs(tables, phases)


def measure(model: str, sizes: tuple[int, ...], lengths: tuple[int, ...], rounds: int, progress: Progress) -> Costs:
    """Medians over the rounds."""
    os.environ.update(KEEP_FREED)
    context = multiprocessing.get_context("spawn")
    task = progress.add_task(f"{model}: compiling", total=rounds)
    pipes: dict[str, Connection] = {}
    phases: dict[str, dict[int, tuple[str, ...]]] = {}
    processes = []
    for way in WAYS:
        pipes[way], other = context.Pipe()
        processes.append(context.Process(target=worker, args=(other, way, model, sizes, lengths)))
        processes[-1].start()
        other.close()  # so that one that fails is an end of file here, not silence
        phases[way] = pipes[way].recv()
    times: dict[str, Times] = {way: {} for way in WAYS}
    for index in range(rounds):
        progress.update(task, description=f"{model}: round {index + 1}", advance=1)
        for way, pipe in pipes.items():
            pipe.send("round")
            for key, seconds in pipe.recv().items():
                times[way].setdefault(key, []).extend(seconds)
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send("end")
        process.join()
    return Costs({way: _medians(found) for way, found in times.items()}, phases)


def _medians(times: Times) -> Table:
    table: Table = {}
    for (phase, rows), seconds in sorted(times.items()):
        table.setdefault(phase, {})[rows] = statistics.median(seconds)
    return table
