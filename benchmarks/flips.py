"""How often a row decides otherwise than its request alone: batches of other sizes round differently.

    python benchmarks/flips.py                     # digits, fp32 and bf16
    python benchmarks/flips.py --requests 64

Pictures of digits are sampled twice by methods that decide in the run: each request alone, and as rows of calls in
which requests join and leave at different steps. A decision is a coin toss where its distance lies at the threshold;
once one falls otherwise the two runs are two, and later decisions differ because of it. So the table counts requests as
well, and says what the pictures differ by.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from report import Column, markdown, results_path, write
from rich.progress import Progress
from worker import quiet

import cachepass

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))
from models import load_dit

METHODS: dict[str, Any] = {
    "first block": cachepass.FirstBlockCacheConfig(threshold=0.12),
    "DBCache": cachepass.DBCacheConfig(Fn_compute_blocks=2, residual_diff_threshold=0.12, max_warmup_steps=4),
    "TeaCache": cachepass.TeaCacheConfig(rel_l1_thresh=0.15, final_steps=0),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LENGTHS = (20, 28, 36)
ROWS = 8


@dataclass
class Sampled:
    """A picture on its way, by Euler's steps from noise to data."""

    name: str
    label: int
    steps: int
    latents: torch.Tensor
    step: int = 0
    decisions: str = ""

    def inputs(self) -> dict[str, torch.Tensor]:
        return {
            "hidden_states": self.latents,
            "timestep": torch.tensor([1000.0 * (1 - self.step / self.steps)], dtype=self.latents.dtype),
            "class_labels": torch.tensor([self.label]),
        }

    def move(self, velocity: torch.Tensor) -> None:
        self.latents = self.latents - velocity / self.steps
        self.step += 1


def _requests(count: int, dtype: torch.dtype) -> list[Sampled]:
    draw = random.Random(0)
    noise = torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(0)).to(dtype).split(1)
    return [Sampled(f"req-{i}", i % 10, draw.choice(LENGTHS), latents) for i, latents in enumerate(noise)]


def _read(model: Any, some: Sequence[Sampled]) -> None:
    """Note what each decided, before its name is forgotten."""
    runs = cachepass.summary(model).last_runs
    for one in some:
        one.decisions = next(iter(runs[one.name].values()))


def alone(model: Any, requests: Sequence[Sampled]) -> None:
    for one in requests:
        with cachepass.cache_context(one.name):
            while one.step < one.steps:
                one.move(model(**one.inputs(), return_dict=False)[0])
        _read(model, [one])
        cachepass.release(one.name)


def in_rows(model: Any, requests: Sequence[Sampled]) -> None:
    """At most eight at once; another one joins at every second step."""
    waiting, active, tick = list(requests), list[Sampled](), 0
    while waiting or active:
        if waiting and len(active) < ROWS and tick % 2 == 0:
            active.append(waiting.pop(0))
        tick += 1
        given = [one.inputs() for one in active]
        with cachepass.rows(*(one.name for one in active)):
            inputs = {key: torch.cat([one[key] for one in given]) for key in given[0]}
            velocities = model(**inputs, return_dict=False)[0].split(1)
        for one, velocity in zip(active, velocities, strict=True):
            one.move(velocity)
        over = [one for one in active if one.step == one.steps]
        if over:
            _read(model, over)
            cachepass.release(*(one.name for one in over))
        active = [one for one in active if one not in over]


def compare(method: str, dtype: str, count: int) -> dict[str, Any]:
    torch._dynamo.reset()
    options = {"cache": METHODS[method], "progress": False}
    model = torch.compile(load_dit().to(DTYPES[dtype]), backend="cached_inductor", fullgraph=True, options=options)
    sets = _requests(count, DTYPES[dtype]), _requests(count, DTYPES[dtype])
    alone(model, sets[0])
    in_rows(model, sets[1])
    flips = others = 0
    worst = 0.0
    for one, other in zip(*sets, strict=True):
        differing = sum(a != b for a, b in zip(one.decisions, other.decisions, strict=True))
        flips, others = flips + differing, others + bool(differing)
        difference = (one.latents.float() - other.latents.float()).norm() / one.latents.float().norm()
        worst = max(worst, float(difference))
    steps = sum(one.steps for one in sets[0])
    predicted = sum(one.decisions.count(".") for one in sets[0])
    return {
        "method": method,
        "dtype": dtype,
        "steps": steps,
        "predicted": 100 * predicted / steps,
        "first": 100 * others / steps,
        "differing": 100 * flips / steps,
        "requests": 100 * others / count,
        "worst": worst,
    }


COLUMNS: tuple[Column, ...] = (
    ("method", "method", str), ("dtype", "dtype", str), ("steps", "steps", str),
    ("predicted %", "predicted", "{:.0f}".format), ("first flips %", "first", "{:.2f}".format),
    ("decisions that differ %", "differing", "{:.2f}".format), ("requests that differ %", "requests", "{:.0f}".format),
    ("worst picture", "worst", "{:.1e}".format),
)  # fmt: skip


@click.command()
@click.option("--requests", default=32, show_default=True, type=click.IntRange(2))
@click.option("--method", multiple=True, default=list(METHODS), show_default=True, type=click.Choice(list(METHODS)))
@click.option("--out", default=None, type=click.Path(path_type=Path), help="JSON file to write.")
def main(requests: int, method: tuple[str, ...], out: Path | None) -> None:
    """Sample, compare, print the table and write the JSON."""
    quiet()
    rows = []
    with Progress(transient=True) as progress, torch.no_grad():
        task = progress.add_task("", total=len(method) * len(DTYPES))
        for dtype in DTYPES:
            for name in method:
                progress.update(task, description=f"{name}, {dtype}", advance=1)
                rows.append(compare(name, dtype, requests))
    results = {"rows against each request alone": rows}
    print(markdown(results, COLUMNS))
    write(results, "cpu", "both", out or results_path("cpu", "-flips"))


if __name__ == "__main__":
    main()
