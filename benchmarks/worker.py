"""Measuring subjects, each in processes of its own, one of them working at a time.

Dynamo keeps state per code object, so subjects would disturb each other in one process; and where a process's memory
happens to lie moves its speed by several per cent, so each subject gets several, one after the other. The first starts
from empty compile caches, the next ones find what it left. On CPU, glibc is told to keep what was freed: else, as the
heap happens to lie, a step gives tens of megabytes back to the kernel and faults them in again in the next (seen: 4913
page faults and 8 ms of a 101 ms step).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
from bounds import Cost, Peaks, measure_peaks, synchronize
from rich.progress import Progress
from shapes import SHAPES
from subjects import OURS_BY_COND, STEPS, SUBJECTS, Case, Subject

from cachepass.testing import count_compiles

KEEP_FREED = {"MALLOC_TRIM_THRESHOLD_": str(1 << 32), "MALLOC_MMAP_THRESHOLD_": str(1 << 32)}


@dataclass
class Measured:
    """What was measured of a subject, in seconds; ``bounds``: what the steps could not be below, by phase."""

    name: str
    compile: list[float] = field(default_factory=list)  # in the first process, then in those with a warm cache
    counts: tuple[int, int, int] = (0, 0, 0)  # graphs, graph breaks, recompiles
    runs: list[list[tuple[str, float]]] = field(default_factory=list)  # phase and time of every step
    bounds: dict[str, float] = field(default_factory=dict)
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    output: torch.Tensor | None = None  # of the last step but one

    def phase_times(self, phase: str) -> list[float]:
        """Median time of the phase's steps in each run; empty for a phase that did not occur."""
        times = [[seconds for name, seconds in run if name == phase] for run in self.runs]
        return [statistics.median(run) for run in times if run]

    @property
    def run_times(self) -> list[float]:
        return [sum(seconds for _, seconds in run) for run in self.runs]


@dataclass(frozen=True)
class _Maker:
    """Makes a subject, known by its place in the table of subjects: closures cannot go to another process."""

    subjects: str
    index: int

    def __call__(self, case: Case) -> Subject | None:
        return SUBJECTS[self.subjects][self.index](case)


class Running:
    """A subject that makes one step of a run after the other."""

    def __init__(self, case: Case, subject: Subject) -> None:
        self.case, self.subject = case, subject
        self._kept: Any = None

    def step(self, step: int) -> tuple[str, float]:
        """The phase and the seconds of a step; the first one begins a run."""
        if step == 0:
            self.subject.reset()
        inputs = self.case.inputs(step)
        synchronize(self.case.device)
        start = time.perf_counter()
        result = self.subject.call(**inputs)
        synchronize(self.case.device)
        seconds = time.perf_counter() - start
        self._kept = result if step == STEPS - 2 else self._kept
        return self.case.phase(step) if self.subject.phased else "compute", seconds

    def run(self) -> float:
        """The seconds of a whole run."""
        return sum(self.step(step)[1] for step in range(STEPS))

    def output(self) -> torch.Tensor:
        """Of the last run's last step but one, which is predicted."""
        kept = self._kept
        sample: Any = kept[0] if isinstance(kept, tuple) else getattr(kept, "sample", kept)
        return sample.float().cpu()


def pay_once(device: str) -> None:
    """Compile something: what a process pays with its first kernel is no model's."""
    torch.compile(lambda x: x.sin() + 1)(torch.ones(64, 64, device=device))


def quiet() -> None:
    """Set up a process: no chatter, and a limit of recompiles that hooks do not reach."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    # At the default limit of 8 Dynamo gives hooks up; this is in their favour.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.accumulated_recompile_limit = 1024


def worker(pipe: Connection, make: _Maker, case: Case, folder: str) -> None:
    """Answers "first" with the seconds and counts of all compilations, a number with that step, "last" with more."""
    quiet()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    with torch.no_grad():
        pay_once(case.device)
        subject = make(case)
        pipe.send(None if subject is None else subject.name)
        if subject is None:
            return
        running = Running(case, subject)
        while (command := pipe.recv()) is not None:
            if command == "first":
                with count_compiles() as counts:
                    start = time.perf_counter()
                    if subject.warmup is not None:
                        subject.warmup()
                    first = time.perf_counter() - start + running.run()
                pipe.send((first - running.run(), (counts.graphs, counts.graph_breaks, counts.recompiles)))
            elif command == "last":
                pipe.send(_last(running))
            else:
                pipe.send(running.step(command))


def _last(running: Running) -> tuple[dict[str, Cost], int | None, int | None, torch.Tensor]:
    costs, peak, output = running.subject.costs(), None, running.output()
    if running.case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        running.run()
        peak = torch.cuda.max_memory_allocated() - before
    return costs, running.subject.cache_bytes(), peak, output


def measure(
    case: Case, subjects: str, rounds: int, processes: int, progress: Progress, *, hurry: bool = False
) -> list[Measured]:
    """Every one of ``SUBJECTS[subjects]`` in ``processes`` processes of ``rounds`` runs each: step by step in turn,
    or process by process where the models are too large to be in memory together.

    ``hurry``: all compile at the same time, and ``cond`` is left out; compile times say nothing then.
    """
    makers = [_Maker(subjects, index) for index in range(len(SUBJECTS[subjects]))]
    makers = [m for m in makers if not (hurry and SUBJECTS[subjects][m.index] is OURS_BY_COND)]
    task = progress.add_task(f"{case.shape}, {subjects}", total=processes * len(makers))
    measured: dict[int, Measured] = {}
    peaks = measure_peaks(case.device, case.dtype)
    os.environ.update(KEEP_FREED)
    turns = [[maker] for maker in makers] if SHAPES[case.shape].large else [makers]
    with ExitStack() as stack:
        folders = {
            make.index: stack.enter_context(tempfile.TemporaryDirectory(prefix="cachepass-benchmark-"))
            for make in makers
        }
        for _ in range(processes):
            for together in turns:
                _measure_together(case, together, rounds, folders, measured, peaks, hurry)
                progress.advance(task, len(together))
    return list(measured.values())


def _measure_together(
    case: Case,
    makers: list[_Maker],
    rounds: int,
    folders: dict[int, str],
    measured: dict[int, Measured],
    peaks: Peaks,
    hurry: bool,
) -> None:
    """One process for each subject; then rounds in which all make a run together, each step in turn."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[int, Connection] = {}
    started = []
    for group in [makers] if hurry else [[make] for make in makers]:
        fresh: dict[int, Connection] = {}
        for make in group:
            fresh[make.index], other = context.Pipe()
            started.append(context.Process(target=worker, args=(other, make, case, folders[make.index])))
            started[-1].start()
            other.close()  # so that one that fails is an end of file here, not silence
        names = {index: pipe.recv() for index, pipe in fresh.items()}
        fresh = {index: pipe for index, pipe in fresh.items() if names[index] is not None}
        for pipe in fresh.values():
            pipe.send("first")
        for index, pipe in fresh.items():
            subject = measured.setdefault(index, Measured(names[index]))
            seconds, counts = pipe.recv()
            subject.compile.append(seconds)
            if len(subject.compile) == 1:
                subject.counts = counts
        pipes |= fresh
    for _ in range(rounds):
        for subject in (measured[index] for index in pipes):
            subject.runs.append([])
        for step in range(STEPS):
            for index, pipe in pipes.items():
                measured[index].runs[-1].append(_ask(pipe, step))
    for index, pipe in pipes.items():
        subject = measured[index]
        costs, subject.cache_bytes, subject.peak_bytes, subject.output = _ask(pipe, "last")
        subject.bounds = {phase: cost.seconds(peaks) for phase, cost in costs.items()}
        pipe.send(None)
    for process in started:
        process.join()


def _ask(pipe: Connection, command: str | int) -> Any:
    pipe.send(command)
    return pipe.recv()
