"""What published models would be on a GPU, without one: launches, bytes and estimated times of every phase.

    python benchmarks/estimates.py                                  # FLUX.1-dev and Wan-1.3B on an H100
    python benchmarks/estimates.py --shape wan-14b --gpu b200 --method taylorseer
    python benchmarks/estimates.py --peers                          # diffusers' hooks, counted the same way
    python benchmarks/estimates.py --beside                         # what was measured on an H100 (docs/performance.md)

The models have no memory (``torch.device("meta")``), so their size does not matter; bf16. Every program is compiled for
the GPU, and nothing runs. Estimates are rooflines (``cachepass/gpu``), no measurements. Prints the markdown tables of
docs/gpu.md and, with ``--out``, writes JSON: into the file, where there is one already.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import click
import torch
from hooked import CONFIGS, counted, launched
from shapes import SHAPES, build, timestep_of
from subjects import TAYLOR
from worker import quiet

import cachepass
from cachepass.gpu.table import GPUS
from cachepass.inspect.target import run_seconds

STEPS = 50
# What papers and pipelines take for these models.
METHODS: dict[str, dict[str, Any]] = {
    "taylorseer": {"cache_interval": 5, "max_order": 1, "disable_cache_before_step": 10},
    "pab": {"spatial_attention_block_skip_range": 2, "cross_attention_block_skip_range": 3},
    "first_block_cache": {"threshold": 0.08},
    "dbcache": {"Fn_compute_blocks": 8, "Bn_compute_blocks": 0},
}
BESIDE = ("flux-dev-9", "wan-1.3b-6"), {"taylorseer": TAYLOR}  # shapes and methods that were measured
PHASES = ("plain", "compute", "predict")


def explained(shape: str, method: str, settings: dict[str, Any], gpu: str) -> cachepass.Explanation:
    """A model of a published size, in bf16 and without memory, with a method."""
    dtype = torch.bfloat16
    model = build(shape, "meta", dtype)
    inputs = SHAPES[shape].inputs()
    inputs = {
        name: value.to("meta", dtype if value.is_floating_point() and "ids" not in name else value.dtype)
        for name, value in inputs.items()
    }
    inputs["timestep"] = torch.tensor([timestep_of(0, STEPS) / SHAPES[shape].unit])
    options = {"num_inference_steps": STEPS, "timestep_scale": SHAPES[shape].unit}
    with torch.no_grad():
        return cachepass.explain(model, cache={"method": method, **settings}, options=options, target=gpu, **inputs)


def row(shape: str, method: str, settings: dict[str, Any], gpu: str) -> dict[str, Any]:
    """What a method's phases launch on a model."""
    explanation = explained(shape, method, settings, gpu)
    target = explanation.target
    assert target is not None
    run = run_seconds(explanation, explanation._calls(STEPS, None, None))
    told: dict[str, Any] = {"method": method, "speedup": run.speedup, "cache_bytes": explanation.cache_bytes}
    for phase in PHASES:
        told[phase] = launched([launch for part in target.of(phase) for launch in part.launches], GPUS[gpu])
    told["activation_bytes"] = target.activation_bytes
    told["weight_bytes"] = target.weight_bytes
    return told


def markdown(rows: list[dict[str, Any]]) -> str:
    head = "| method | " + " | ".join(f"{phase}: launches, GB, ms" for phase in PHASES)
    lines = [head + " | compute, predict / plain | 50 steps, times as fast |", "|---|---|---|---|---|---|"]
    for told in rows:
        cells = [
            f"{told[phase]['launches']}, {told[phase]['bytes'] / 1e9:.1f}, {1000 * told[phase]['seconds']:.1f}"
            for phase in PHASES
        ]
        least, most = told.get("speedup", (0.0, 0.0))
        span = "" if not most else f"{least:.2f}" if most - least < 0.005 else f"{least:.2f} to {most:.2f}"
        shares = [f"{told[phase]['seconds'] / told['plain']['seconds']:.3f}" for phase in PHASES[1:]]
        lines.append(f"| {told['method']} | {' | '.join(cells)} | {', '.join(shares)} | {span} |")
    return "\n".join(lines)


def write(out: Path, part: str, results: dict[str, Any], about: dict[str, Any]) -> None:
    """Into a JSON file, beside its other parts."""
    written = json.loads(out.read_text()) if out.exists() else {}
    out.write_text(json.dumps(written | {"about": about, part: results}, indent=1) + "\n")


@click.command()
@click.option("--shape", "shapes", multiple=True, default=("flux-dev", "wan-1.3b"), type=click.Choice(list(SHAPES)))
@click.option("--method", "methods", multiple=True, default=tuple(METHODS), type=click.Choice(list(METHODS)))
@click.option("--gpu", default="h100", type=click.Choice(list(GPUS)), show_default=True)
@click.option("--out", default=None, type=click.Path(path_type=Path), help="JSON file to write.")
@click.option("--peers", is_flag=True, help="Diffusers' hooks, as torch.compile runs them.")
@click.option("--beside", is_flag=True, help="The shapes and settings that were measured.")
def main(
    shapes: tuple[str, ...], methods: tuple[str, ...], gpu: str, out: Path | None, peers: bool, beside: bool
) -> None:
    """Compile for a GPU, print the markdown tables."""
    quiet()
    settings = {method: METHODS[method] for method in methods if not peers or method in CONFIGS}
    if beside:
        shapes, settings = BESIDE
    part = ("peers" if peers else "results") + ("_beside" if beside else "")
    results: dict[str, list[dict[str, Any]]] = {}
    for shape in shapes:
        for method, chosen in settings.items():
            start = time.perf_counter()
            told = counted(shape, method, chosen, GPUS[gpu]) if peers else row(shape, method, chosen, gpu)
            told["explain_seconds"] = time.perf_counter() - start
            results.setdefault(shape, []).append(told)
            click.echo(f"{shape}, {method}: {told['explain_seconds']:.0f} s", err=True)
            if out is not None:
                about = {"gpu": GPUS[gpu].title, "torch": torch.__version__, "steps": STEPS, "methods": METHODS}
                write(out, part, results, about)
    whose = ", diffusers' hooks" if peers else ""
    for shape, rows in results.items():
        click.echo(f"\n**{shape} ({SHAPES[shape].about}){whose}, {GPUS[gpu].title}, estimated**\n\n{markdown(rows)}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    click.echo(f"\npeak memory of this process: {peak / 2**20:.1f} GiB", err=True)


if __name__ == "__main__":
    main()
