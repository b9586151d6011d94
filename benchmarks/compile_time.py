"""Compile seconds, from empty caches and from warm ones, and what they grow by for each block.

    python benchmarks/compile_time.py
    python benchmarks/compile_time.py --shape flux --method fastercache --subjects "compile time, all"

Every subject is compiled in a process of its own with an empty cache folder, and again in another one with that folder.
What is timed begins with the model on the device and ends when every program that a run needs is there: of cachepass
``cachepass.warmup``, of plain Inductor the first call, of hooks a run less the same run later. The *fixed* part, which
the first program of a process pays, whatever it is (header files, a probe of the CPU), is in all of them, and measured
by itself too.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import torch
from report import Column, mebibytes, publish
from rich.progress import Progress
from shapes import SHAPES
from subjects import METHODS, SUBJECTS, Case, Subject
from worker import Running, pay_once, quiet

from cachepass.testing import count_compiles

COLUMNS: tuple[Column, ...] = (
    ("shape", "shape", str), ("subject", "subject", str), ("cold s", "cold_s", lambda v: f"{v:.1f}"),
    ("cold / plain", "cold_vs_plain", lambda v: f"{v:.2f}"),
    ("cold / plain by blocks", "cold_vs_regional", lambda v: f"{v:.2f}"),
    ("fixed s", "fixed_s", lambda v: f"{v:.1f}"), ("warm s", "warm_s", lambda v: f"{v:.1f}"),
    ("warm / cold", "warm_vs_cold", lambda v: f"{v:.2f}"), ("graphs", "graphs", str), ("breaks", "graph_breaks", str),
    ("recompiles", "recompiles", str), ("peak MiB", "peak_bytes", mebibytes),
    ("of compiling MiB", "compiling_bytes", mebibytes), ("of compiling / plain", "peak_vs_plain", lambda v: f"{v:.2f}"),
)  # fmt: skip
GROWTH: tuple[Column, ...] = (
    ("subject", "subject", str), ("from", "from", str), ("to", "to", str),
    ("s for each further block", "seconds_per_block", lambda v: f"{v:.2f}"),
    ("/ plain", "per_block_vs_plain", lambda v: f"{v:.2f}"),
)  # fmt: skip
_PLAIN, _REGIONAL = "plain Inductor", "plain Inductor, compile_repeated_blocks"


@dataclass(frozen=True)
class Compiled:
    """What compiling a subject took, in seconds and bytes. ``peak``: of the process; ``before``: up to
    compiling, with the model."""

    name: str
    seconds: float
    counts: tuple[int, int, int]  # graphs, graph breaks, recompiles
    before: int
    peak: int


def _worker(pipe: Connection, subjects: str, index: int, case: Case, folder: str) -> None:
    quiet()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    if index < 0:
        start = time.perf_counter()
        pay_once(case.device)
        pipe.send(time.perf_counter() - start)
        return
    with torch.no_grad():
        subject = SUBJECTS[subjects][index](case)
        if subject is None:
            pipe.send(None)
            return
        before = _peak()
        with count_compiles() as counts:
            seconds = _compile(case, subject)
        numbers = counts.graphs, counts.graph_breaks, counts.recompiles
        pipe.send(Compiled(subject.name, seconds, numbers, before, _peak()))


def _peak() -> int:
    """The most bytes that the process had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _compile(case: Case, subject: Subject) -> float:
    inputs = case.inputs(0)
    start = time.perf_counter()
    if subject.warmup is not None:
        subject.warmup()
    elif not subject.phased:
        subject.call(**inputs)
    else:
        running = Running(case, subject)
        return running.run() - running.run()
    return time.perf_counter() - start


def _run(subjects: str, index: int, case: Case, folder: str) -> Any:
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=_worker, args=(other, subjects, index, case, folder))
    process.start()
    other.close()
    answer = pipe.recv()
    process.join()
    return answer


def measure(case: Case, subjects: str, progress: Progress) -> list[dict[str, Any]]:
    """A line of the table for each subject."""
    rows: list[dict[str, Any]] = []
    count = len(SUBJECTS[subjects])
    task = progress.add_task(f"{case.method} on {case.shape}", total=count + 1)
    with tempfile.TemporaryDirectory(prefix="cachepass-benchmark-") as folder:
        fixed = _run(subjects, -1, case, folder)
    progress.advance(task)
    for index in range(count):
        with tempfile.TemporaryDirectory(prefix="cachepass-benchmark-") as folder:
            cold, warm = (_run(subjects, index, case, folder) for _ in range(2))
        progress.advance(task)
        if cold is not None:
            rows.append(_row(case, cold, warm, fixed))
    plain = next((row for row in rows if row["subject"] == _PLAIN), None)
    regional = next((row for row in rows if row["subject"] == _REGIONAL), None)
    for row in rows:
        if plain is not None:
            row["cold_vs_plain"] = row["cold_s"] / plain["cold_s"]
            row["peak_vs_plain"] = row["compiling_bytes"] / plain["compiling_bytes"]
        if regional is not None:
            row["cold_vs_regional"] = row["cold_s"] / regional["cold_s"]
    return rows


def _row(case: Case, cold: Compiled, warm: Compiled, fixed: float) -> dict[str, Any]:
    return {
        "shape": case.shape,
        "subject": cold.name,
        "cold_s": cold.seconds,
        "warm_s": warm.seconds,
        "warm_vs_cold": warm.seconds / cold.seconds,
        "fixed_s": fixed,
        "graphs": cold.counts[0],
        "graph_breaks": cold.counts[1],
        "recompiles": cold.counts[2],
        "peak_bytes": cold.peak,
        "compiling_bytes": cold.peak - cold.before,
    }


def growth(rows: list[dict[str, Any]], small: str, large: str) -> list[dict[str, Any]]:
    """Seconds for each block that one shape has more than another, for each subject that both were measured with."""
    blocks = int(large.split("-")[1]) - int(small.split("-")[1])
    cold = {(row["shape"], row["subject"]): row["cold_s"] for row in rows}
    subjects = [row["subject"] for row in rows if row["shape"] == large and (small, row["subject"]) in cold]
    each = {subject: (cold[large, subject] - cold[small, subject]) / blocks for subject in subjects}
    return [
        {
            "subject": subject,
            "from": small,
            "to": large,
            "seconds_per_block": seconds,
            "per_block_vs_plain": seconds / each[_PLAIN] if _PLAIN in each else None,
        }
        for subject, seconds in each.items()
    ]


@click.command()
@click.option("--shape", "shapes", multiple=True, default=("flux-6", "flux-18", "flux-57", "wan-30"), show_default=True,
              type=click.Choice(list(SHAPES)))  # fmt: skip
@click.option(
    "--method", "methods", multiple=True, type=click.Choice(METHODS), default=("taylorseer",), show_default=True
)
@click.option("--subjects", default="compile time", show_default=True, type=click.Choice(list(SUBJECTS)))
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--out", default=None, type=click.Path(path_type=Path), help="JSON file to write.")
def main(shapes: tuple[str, ...], methods: tuple[str, ...], subjects: str, device: str, out: Path | None) -> None:
    """Measure, print the markdown tables; with --out, write the JSON."""
    results: dict[str, Any] = {}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with Progress() as progress:
        for method in methods:
            rows = [row for shape in shapes for row in measure(Case(shape, method, device, dtype), subjects, progress)]
            results[f"compiling, {method}"] = rows
            if {"flux-18", "flux-57"} <= set(shapes):
                publish({f"growth, {method}": growth(rows, "flux-18", "flux-57")}, GROWTH, device, str(dtype), None)
    publish(results, COLUMNS, device, str(dtype), out)


if __name__ == "__main__":
    main()
