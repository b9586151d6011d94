"""What published models would be on a GPU, without one: launches, bytes and estimated times of every phase.

    python benchmarks/estimates.py                                  # FLUX.1-dev and Wan-1.3B on an H100
    python benchmarks/estimates.py --shape wan-14b --gpu b200 --method taylorseer

The models have no memory (``torch.device("meta")``), so their size does not matter; bf16. Every program is compiled for
the GPU, and nothing runs. Estimates are rooflines (``cachepass/gpu``), no measurements. Prints the markdown table of
docs/gpu.md and, with ``--out``, writes JSON.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import click
import torch
from shapes import SHAPES, build, timestep_of
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


def explained(shape: str, method: str, gpu: str) -> cachepass.Explanation:
    """A model of a published size, in bf16 and without memory, with a method at its usual settings."""
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
        return cachepass.explain(
            model, cache={"method": method, **METHODS[method]}, options=options, target=gpu, **inputs
        )


def row(explanation: cachepass.Explanation, method: str) -> dict[str, Any]:
    target = explanation.target
    assert target is not None
    run = run_seconds(explanation, explanation._calls(STEPS, None, None))
    told: dict[str, Any] = {"method": method, "speedup": run.speedup, "cache_bytes": explanation.cache_bytes}
    for phase in ("plain", "compute", "predict"):
        told[phase] = {
            "launches": target.launches(phase),
            "fused": sum(launch.fused for program in target.of(phase) for launch in program.launches),
            "bytes": target.bytes_moved(phase),
            "flops": target.flops(phase),
            "seconds": target.seconds(phase),
        }
    told["activation_bytes"] = target.activation_bytes
    told["weight_bytes"] = target.weight_bytes
    return told


def markdown(rows: list[dict[str, Any]]) -> str:
    head = "| method | " + " | ".join(f"{p}: launches, GB, ms" for p in ("plain", "compute", "predict"))
    lines = [head + " | predict / plain | 50 steps, times as fast |", "|---|---|---|---|---|---|"]
    for told in rows:
        cells = [
            f"{told[p]['launches']}, {told[p]['bytes'] / 1e9:.1f}, {1000 * told[p]['seconds']:.1f}"
            for p in ("plain", "compute", "predict")
        ]
        least, most = told["speedup"]
        span = f"{least:.2f}" if most - least < 0.005 else f"{least:.2f} to {most:.2f}"
        share = told["predict"]["seconds"] / told["plain"]["seconds"]
        lines.append(f"| {told['method']} | {' | '.join(cells)} | {share:.3f} | {span} |")
    return "\n".join(lines)


@click.command()
@click.option("--shape", "shapes", multiple=True, default=("flux-dev", "wan-1.3b"), type=click.Choice(list(SHAPES)))
@click.option("--method", "methods", multiple=True, default=tuple(METHODS), type=click.Choice(list(METHODS)))
@click.option("--gpu", default="h100", type=click.Choice(list(GPUS)), show_default=True)
@click.option("--out", default=None, type=click.Path(path_type=Path), help="JSON file to write.")
def main(shapes: tuple[str, ...], methods: tuple[str, ...], gpu: str, out: Path | None) -> None:
    """Compile for a GPU, print the markdown tables."""
    quiet()
    results: dict[str, list[dict[str, Any]]] = {}
    for shape in shapes:
        for method in methods:
            start = time.perf_counter()
            explanation = explained(shape, method, gpu)
            told = row(explanation, method) | {"explain_seconds": time.perf_counter() - start}
            results.setdefault(shape, []).append(told)
            click.echo(f"{shape}, {method}: {told['explain_seconds']:.0f} s", err=True)
            if out is not None:
                about = {"gpu": GPUS[gpu].title, "torch": torch.__version__, "steps": STEPS, "methods": METHODS}
                out.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    for shape, rows in results.items():
        click.echo(f"\n**{shape} ({SHAPES[shape].about}), {GPUS[gpu].title}, estimated**\n\n{markdown(rows)}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    click.echo(f"\npeak memory of this process: {peak / 2**20:.1f} GiB", err=True)


if __name__ == "__main__":
    main()
