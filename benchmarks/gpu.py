"""All that a GPU has to tell, by one command that takes less than ten minutes on an H100.

    python benchmarks/gpu.py                    # tests that need CUDA, then cases, most telling first
    python benchmarks/gpu.py --toy              # a dry run on the CPU: one small case, the same way through

Every stage is written to ``benchmarks/results/<gpu>-<date>-gpu.json`` when it is done, so a run that was cut is gone on
with by the same command; a stage that does not fit into the GPU's memory, or into the minutes that are left, is left
out and named. Beside what was measured stands what was estimated for this GPU (``cachepass.explain(..., target=...)``).

Its wheels, for a machine without a network (``pip download``, then ``pip install --no-index --no-deps``): cachepass
itself, diffusers, cache-dit, triton (that of its torch), click, rich, jinja2, wrapt, and for the tests pytest,
pytest-xdist, expecttest, hypothesis.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from report import STEP_COLUMNS, Column, markdown, results_path, write
from rich.progress import Progress
from shapes import SHAPES
from steps import row
from subjects import Case, our_cache
from worker import measure, quiet

import cachepass
from cachepass.gpu.table import GPUS, Gpu

TOP = Path(__file__).parents[1]
COLUMNS: tuple[Column, ...] = (
    *STEP_COLUMNS,
    ("compute estimate ms", "compute_estimate_ms", lambda value: f"{value:.2f}"),
    ("predict estimate ms", "predict_estimate_ms", lambda value: f"{value:.2f}"),
)


@dataclass(frozen=True)
class Stage:
    """A case: which subjects run what, and the seconds that it took on an H100 (or is thought to take)."""

    shape: str
    method: str
    subjects: str
    seconds: int

    @property
    def name(self) -> str:
        return f"{self.method} on {self.shape} ({SHAPES[self.shape].about})"


STAGES = (
    Stage("flux-dev-9", "taylorseer-usual", "gpu", 90),
    Stage("wan-1.3b-6", "taylorseer-usual", "gpu", 110),
    Stage("flux-dev-9", "first-block", "first-block", 90),
    Stage("flux-dev", "taylorseer-usual", "whole", 150),
    Stage("wan-1.3b-6", "pab", "pab", 100),
    Stage("cogvideox", "fastercache", "fastercache", 60),
    Stage("dit", "taylorseer", "taylorseer", 50),
    Stage("pixart", "taylorseer", "taylorseer", 50),
    Stage("wan-1.3b", "taylorseer-usual", "whole", 200),
)
TOY = (Stage("toy", "taylorseer-usual", "toy", 60),)


def explained(case: Case, gpu: Gpu) -> cachepass.Explanation:
    """The case for a GPU, without memory."""
    model = Case(case.shape, case.method, "meta", case.dtype).build()
    inputs = Case(case.shape, case.method, "cpu", case.dtype).inputs(0)
    with torch.no_grad():
        return cachepass.explain(
            model, cache=our_cache(case), options={"timestep_scale": SHAPES[case.shape].unit}, target=gpu, **inputs
        )


def bytes_needed(explanation: cachepass.Explanation) -> int:
    """Weights, slots and the most that a program allocates."""
    target = explanation.target
    assert target is not None
    return target.weight_bytes + explanation.cache_bytes + target.activation_bytes


def measured(stage: Stage, device: str, gpu: Gpu, left: Callable[[], float]) -> list[dict[str, Any]] | str:
    """The rows of a stage, or why there are none."""
    if left() < stage.seconds:
        return f"left out: it takes {stage.seconds} s, and {left():.0f} s are left"
    case = Case(stage.shape, stage.method, device, torch.bfloat16 if device == "cuda" else torch.float32)
    explanation = explained(case, gpu)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else sys.maxsize
    if bytes_needed(explanation) > free:
        return f"left out: it needs {bytes_needed(explanation) / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free"
    with Progress(transient=True) as progress:
        subjects = measure(case, stage.subjects, 2, 1, progress, hurry=True)
    rows = [row(case, subject, subjects) for subject in subjects]
    target = explanation.target
    assert target is not None
    for told in rows:
        ours = told["subject"].startswith("cachepass")
        if ours or told["subject"] == "plain Inductor":
            told["compute_estimate_ms"] = 1000 * target.seconds("compute" if ours else "plain")
        if ours and "predict" in target.calls:
            told["predict_estimate_ms"] = 1000 * target.seconds("predict")
    return rows


def cuda_tests() -> dict[str, Any]:
    """The tests that need CUDA."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-n", "0", "-q", "-p", "no:cacheprovider"]
    ran = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False)
    return {"exit": ran.returncode, "seconds": time.perf_counter() - start, "tail": ran.stdout.splitlines()[-12:]}


def _gpu_at_hand() -> Gpu:
    """That of the table whose name the device has; an H100's figures for others."""
    name = torch.cuda.get_device_name().lower().replace(" ", "") if torch.cuda.is_available() else ""
    return next((gpu for key, gpu in GPUS.items() if key in name), GPUS["h100"])


@click.command()
@click.option("--toy", is_flag=True, help="A dry run on the CPU.")
@click.option("--minutes", default=9.0, show_default=True, help="After which nothing more is begun.")
@click.option("--tests/--no-tests", default=True, show_default=True, help="Run the tests that need CUDA first.")
@click.option("--out", default=None, type=click.Path(path_type=Path), help="JSON file to write and to go on with.")
def main(toy: bool, minutes: float, tests: bool, out: Path | None) -> None:
    """Test and measure on the GPU at hand; write JSON, print the table."""
    if not toy and not torch.cuda.is_available():
        raise click.ClickException("there is no CUDA device; --toy is the dry run on the CPU")
    quiet()
    start, device = time.perf_counter(), "cpu" if toy else "cuda"
    gpu = _gpu_at_hand()
    results: dict[str, Any] = {}
    path = out or results_path(device, "-gpu")
    if path.exists():
        results = json.loads(path.read_text())["results"]

    def left() -> float:
        return 60 * minutes - (time.perf_counter() - start)

    if tests and "CUDA tests" not in results:
        results["CUDA tests"] = cuda_tests()
    for stage in TOY if toy else STAGES:
        if isinstance(results.get(stage.name), list):
            continue
        results[stage.name] = measured(stage, device, gpu, left)
        write(results, device, "torch.bfloat16", path, estimated_for=gpu.title)
        click.echo(f"{stage.name}: {'measured' if isinstance(results[stage.name], list) else results[stage.name]}")
    print(markdown({name: rows for name, rows in results.items() if isinstance(rows, list)}, COLUMNS))


if __name__ == "__main__":
    main()
