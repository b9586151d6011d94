"""Steps and runs of cached models against what a user would pick instead, interleaved in one call.

    python benchmarks/steps.py                                     # all small shapes and methods, on the device at hand
    python benchmarks/steps.py --shape flux --method taylorseer --rounds 5
    python benchmarks/steps.py --shape flux-dev --shape wan-1.3b --method taylorseer      # on a GPU

Every subject runs the same schedule of 28 steps on the same inputs. A round runs every subject once, in turn, so drift
of the machine's speed hits all alike; medians over rounds and processes, ratios from the same call. "bound" is what a
program's matrix products, attentions and bytes take at the rates that the machine reached in a large product and a
large copy. Writes ``benchmarks/results/<device>-<date>.json`` and prints the markdown table of docs/performance.md.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import click
import torch
from report import STEP_COLUMNS, markdown
from rich.progress import Progress
from shapes import SHAPES, SMALL
from subjects import FORMATS, METHODS, STEPS, Case
from worker import Measured, measure

RESULTS = Path(__file__).parent / "results"


def row(case: Case, subject: Measured, subjects: list[Measured]) -> dict[str, Any]:
    """One line of the table: medians in ms, and ratios."""
    base = subjects[0]
    peers = [s for s in subjects if s.name.startswith(("diffusers", "cache-dit"))]
    hooked = next((s for s in peers if "torch.compile" in s.name), None)

    def ms(s: Measured | None, phase: str) -> float | None:
        return 1000 * statistics.median(s.steps[phase]) if s is not None and s.steps.get(phase) else None

    phases = {phase: ms(subject, phase) for phase in ("compute", "skip", "predict")} if subject.steps else {}
    is_ours = subject.name.startswith("cachepass")
    run = 1000 * statistics.median(subject.runs)
    ideal = None
    if is_ours:
        ideal = sum(phases[case.phase(step)] or 0.0 for step in range(STEPS))
    same = [s for s in peers if s.name.startswith("diffusers")]
    best = min((statistics.median(s.runs) for s in same), default=None)
    result: dict[str, Any] = {"subject": subject.name, "run_ms": run, "cache_bytes": subject.cache_bytes}
    if subject.name.startswith("cache-dit"):
        phases = {}
    result |= {f"{phase}_ms": value for phase, value in phases.items()}
    result |= {
        "compute_vs_plain": _ratio(phases.get("compute"), ms(base, "compute")),
        "skip_vs_hooks": _ratio(phases.get("skip"), ms(hooked, "skip")),
        "predict_vs_hooks": _ratio(phases.get("predict"), ms(hooked, "predict")),
        "compute_vs_bound": _ratio(phases.get("compute"), _bound(subject, "compute")),
        "skip_vs_bound": _ratio(phases.get("skip"), _bound(subject, "skip")),
        "predict_vs_bound": _ratio(phases.get("predict"), _bound(subject, "predict")),
        "run_vs_plain": _ratio(run, 1000 * statistics.median(base.runs)),
        "run_vs_ideal": _ratio(run, ideal),
        "run_vs_best_hooks": _ratio(run, None if best is None else 1000 * best) if is_ours else None,
        "difference": _difference(subject, hooked or base),
        "cold_compile_s": subject.compile[0],
        "cold_vs_plain": _ratio(subject.compile[0], base.compile[0]),
        "warm_compile_s": statistics.median(subject.compile[1:]) if subject.compile[1:] else None,
        "graphs": subject.counts[0], "graph_breaks": subject.counts[1], "recompiles": subject.counts[2],
        "peak_bytes": subject.peak_bytes,
    }  # fmt: skip
    result["warm_vs_cold"] = _ratio(result["warm_compile_s"], subject.compile[0])
    return result


def _ratio(value: float | None, to: float | None) -> float | None:
    return None if value is None or not to else value / to


def _bound(subject: Measured, phase: str) -> float | None:
    return None if phase not in subject.bounds else 1000 * subject.bounds[phase]


def _difference(subject: Measured, reference: Measured) -> float | None:
    """Relative difference of the last step's output to the compiled hooks', or without them to plain Inductor's."""
    if subject is reference or subject.output is None or reference.output is None:
        return None
    return float((subject.output - reference.output).norm() / reference.output.norm())


@click.command()
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)), help="Default: all small ones.")
@click.option("--method", "methods", multiple=True, type=click.Choice(METHODS), help="Default: all.")
@click.option("--rounds", default=3, show_default=True, help="Runs in each process.")
@click.option("--processes", default=2, show_default=True, help="Processes of each subject, one after the other.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--dtype", default=None, type=click.Choice(["float32", "bfloat16"]), help="Default: bfloat16 on CUDA.")
@click.option("--out", default=None, type=click.Path(path_type=Path), help="JSON file to write.")
def main(shapes: tuple[str, ...], methods: tuple[str, ...], rounds: int, processes: int, device: str,
         dtype: str | None, out: Path | None) -> None:  # fmt: skip
    """Measure, print the markdown table and write the JSON."""
    kind = getattr(torch, dtype or ("bfloat16" if device == "cuda" else "float32"))
    results = {}
    with Progress() as progress:
        for shape in shapes or SMALL:
            for method in methods or METHODS:
                case = Case(shape, method, device, kind)
                if case.guided and shape not in FORMATS:
                    continue  # it takes no guidance batch
                subjects = measure(case, method, rounds, processes, progress)
                title = f"{method} on {shape} ({SHAPES[shape].about})"
                results[title] = [row(case, subject, subjects) for subject in subjects]
                path = write(results, device, str(kind), out, rounds=rounds, processes=processes, steps=STEPS)
                progress.console.print(f"wrote {path}")
    print(markdown(results, STEP_COLUMNS))


def write(results: dict[str, Any], device: str, dtype: str, out: Path | None, **about: Any) -> Path:
    """The results as JSON, with what they were measured on."""
    name = torch.cuda.get_device_name().lower().replace(" ", "-") if device == "cuda" else "cpu"
    today = datetime.date.today().isoformat()
    path = out or RESULTS / f"{name}-{today}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about |= {"date": today, "device": name, "dtype": dtype, "torch": torch.__version__,
              "threads": torch.get_num_threads(), "machine": platform.machine()}  # fmt: skip
    path.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    return path


if __name__ == "__main__":
    main()
