"""Step times of programs that call one body for all blocks, against those in which every block is compiled by itself.

    python benchmarks/sharing.py
    python benchmarks/sharing.py --shape wan --method taylorseer-blocks

Both in a process of its own, step by step in turn, with the same random weights.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import click
import torch
from report import Column, publish
from rich.progress import Progress
from shapes import SHAPES
from subjects import METHODS, Case
from worker import Measured, measure

COLUMNS: tuple[Column, ...] = (
    ("shape", "shape", str), ("method", "method", str), ("phase", "phase", str),
    ("shared ms", "shared_ms", lambda v: f"{v:.1f}"), ("not shared ms", "alone_ms", lambda v: f"{v:.1f}"),
    ("shared / not", "ratio", lambda v: f"{v:.3f}"), ("compile s", "shared_s", lambda v: f"{v:.1f}"),
    ("not shared s", "alone_s", lambda v: f"{v:.1f}"), ("difference", "difference", lambda v: f"{v:.0e}"),
)  # fmt: skip


def rows(case: Case, shared: Measured, alone: Measured) -> list[dict[str, Any]]:
    """A line for each phase: medians over the runs of the medians of each, and of their ratios."""
    assert shared.output is not None and alone.output is not None
    difference = float((shared.output - alone.output).norm() / alone.output.norm())
    result = []
    for phase in ("compute", "skip", "predict"):
        ours, theirs = shared.phase_times(phase), alone.phase_times(phase)
        if ours:
            result.append(
                {
                    "shape": case.shape,
                    "method": case.method,
                    "phase": phase,
                    "shared_ms": 1000 * statistics.median(ours),
                    "alone_ms": 1000 * statistics.median(theirs),
                    "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
                    "shared_s": shared.compile[0],
                    "alone_s": alone.compile[0],
                    "difference": difference,
                }
            )
    return result


@click.command()
@click.option("--shape", "shapes", multiple=True, default=("flux-18", "wan", "dit"), show_default=True,
              type=click.Choice(list(SHAPES)))  # fmt: skip
@click.option(
    "--method", "methods", multiple=True, default=("taylorseer",), show_default=True, type=click.Choice(METHODS)
)
@click.option("--rounds", default=3, show_default=True, help="Runs in each process.")
@click.option("--processes", default=2, show_default=True, help="Processes of each subject, one after the other.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--out", default=None, type=click.Path(path_type=Path), help="JSON file to write.")
def main(
    shapes: tuple[str, ...], methods: tuple[str, ...], rounds: int, processes: int, device: str, out: Path | None
) -> None:
    """Measure, print the markdown table; with --out, write the JSON."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    found: list[dict[str, Any]] = []
    with Progress() as progress:
        for shape in shapes:
            for method in methods:
                case = Case(shape, method, device, dtype)
                shared, alone = measure(case, "sharing", rounds, processes, progress)
                found += rows(case, shared, alone)
    publish({"blocks compiled once": found}, COLUMNS, device, str(dtype), out)


if __name__ == "__main__":
    main()
