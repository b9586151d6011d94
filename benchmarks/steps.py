"""Steps and runs of cached models against what a user would pick instead, interleaved in one call.

    python benchmarks/steps.py                                     # all small shapes and methods, on the device at hand
    python benchmarks/steps.py --shape flux --method taylorseer --rounds 5
    python benchmarks/steps.py --shape flux-dev --shape wan-1.3b --method taylorseer      # on a GPU

Every subject runs the same schedule of 28 steps on the same inputs. In a round all subjects make a run, taking turns
step by step, so drift of the machine's speed hits all alike; ratios are taken within a round, and medians over the
rounds of all processes.
"bound" is what a program's matrix products, attentions and bytes take at the rates that the machine reached in a large
product and a large copy. Writes ``benchmarks/results/<device>-<date>.json`` and prints the markdown table of
docs/performance.md.
"""

from __future__ import annotations

import operator
import statistics
from pathlib import Path
from typing import Any

import click
import torch
from report import STEP_COLUMNS, markdown, write
from rich.progress import Progress
from shapes import SHAPES, SMALL
from subjects import DECIDING, FORMATS, METHODS, STEPS, Case
from worker import Measured, measure


def row(case: Case, subject: Measured, subjects: list[Measured]) -> dict[str, Any]:
    """One line of the table: medians in ms, and ratios: the medians of those of each round."""
    base = subjects[0]
    hooks = [s for s in subjects if s.name.startswith(("diffusers", "cache-dit"))]
    hooked = next((s for s in hooks if "torch.compile" in s.name), hooks[0] if hooks else None)
    best = min(hooks, key=lambda s: statistics.median(s.run_times), default=None)
    is_ours = subject.name.startswith("cachepass")
    # Which of cache-dit's steps are computed is not visible from outside, but for steps that anyone can foretell.
    hidden = subject.name.startswith("cache-dit") and case.method not in DECIDING
    phases = () if hidden else ("compute", "skip", "predict")
    times = {phase: subject.phase_times(phase) for phase in phases}
    result: dict[str, Any] = {
        "subject": subject.name,
        "run_ms": _ms(subject.run_times),
        "cache_bytes": subject.cache_bytes,
        "run_vs_plain": _ratio(subject.run_times, base.run_times),
        "run_vs_ideal": _ratio(subject.run_times, _ideal(case, times)) if is_ours else None,
        "run_vs_best_hooks": _ratio(subject.run_times, best.run_times) if is_ours and best else None,
        "compute_vs_plain": _ratio(times.get("compute", []), base.phase_times("compute")),
        "difference": _difference(subject, hooked or base),
        "cold_compile_s": subject.compile[0],
        "cold_vs_plain": subject.compile[0] / base.compile[0],
        "graphs": subject.counts[0],
        "graph_breaks": subject.counts[1],
        "recompiles": subject.counts[2],
        "peak_bytes": subject.peak_bytes,
    }
    for phase, seconds in times.items():
        result[f"{phase}_ms"] = _ms(seconds)
        if phase in subject.bounds:
            result[f"{phase}_vs_bound"] = _ratio(seconds, len(seconds) * [subject.bounds[phase]])
        if hooked is not None and phase != "compute":
            result[f"{phase}_vs_hooks"] = _ratio(seconds, hooked.phase_times(phase))
    if subject.compile[1:]:
        result["warm_compile_s"] = statistics.median(subject.compile[1:])
        result["warm_vs_cold"] = result["warm_compile_s"] / subject.compile[0]
    return result


def _ms(seconds: list[float]) -> float | None:
    return 1000 * statistics.median(seconds) if seconds else None


def _ratio(values: list[float], to: list[float]) -> float | None:
    """Median of the ratios of each round."""
    return statistics.median(map(operator.truediv, values, to)) if values and to else None


def _ideal(case: Case, times: dict[str, list[float]]) -> list[float]:
    """Of each round: what its run takes if every step takes its phase's median."""
    occurring = {phase: seconds for phase, seconds in times.items() if seconds}
    rounds = [dict(zip(occurring, medians, strict=True)) for medians in zip(*occurring.values(), strict=True)]
    return [sum(medians[case.phase(step)] for step in range(STEPS)) for medians in rounds]


def _difference(subject: Measured, reference: Measured) -> float | None:
    """Relative difference of the last step's output to the compiled hooks', or without them to plain Inductor's."""
    if subject is reference or subject.output is None or reference.output is None:
        return None
    return float((subject.output - reference.output).norm() / reference.output.norm())


@click.command()
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)), help="Default: all small ones.")
@click.option("--method", "methods", multiple=True, type=click.Choice(METHODS), help="Default: all.")
@click.option("--rounds", default=4, show_default=True, help="Runs in each process.")
@click.option("--processes", default=2, show_default=True, help="Processes of each subject, one after the other.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--dtype", default=None, type=click.Choice(["float32", "bfloat16"]), help="Default: bfloat16 on CUDA.")
@click.option("--hurry", is_flag=True, help="All subjects compile at once, without cond: compile times say nothing.")
@click.option("--out", default=None, type=click.Path(path_type=Path), help="JSON file to write.")
def main(
    shapes: tuple[str, ...],
    methods: tuple[str, ...],
    rounds: int,
    processes: int,
    device: str,
    dtype: str | None,
    hurry: bool,
    out: Path | None,
) -> None:
    """Measure, print the markdown table and write the JSON."""
    kind = getattr(torch, dtype or ("bfloat16" if device == "cuda" else "float32"))
    results = {}
    with Progress() as progress:
        for shape in shapes or SMALL:
            for method in methods or METHODS:
                case = Case(shape, method, device, kind)
                if case.guided and shape not in FORMATS:
                    continue  # it takes no guidance batch
                subjects = measure(case, method, rounds, processes, progress, hurry=hurry)
                title = f"{method} on {shape} ({SHAPES[shape].about})"
                results[title] = [row(case, subject, subjects) for subject in subjects]
                path = write(results, device, str(kind), out, rounds=rounds, processes=processes, steps=STEPS)
                progress.console.print(f"wrote {path}")
    print(markdown(results, STEP_COLUMNS))


if __name__ == "__main__":
    main()
