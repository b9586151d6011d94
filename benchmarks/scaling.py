"""How cost grows with depth, tokens and steps: TaylorSeer on the attentions of a DiT.

    python benchmarks/scaling.py

Each line is one model in a process of its own: median step times, the bound beside them, cold compile seconds of all
phases, operations of the predicted program and cache bytes.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import torch
from bounds import Peaks, cost_of, measure_peaks, synchronize
from report import Column, mebibytes, publish
from rich.progress import track
from subjects import TAYLOR, taylor_phase
from worker import KEEP_FREED, pay_once

import cachepass
from cachepass.run.live import programs_of

CONFIGS = [(3, 32, 28), (6, 32, 28), (12, 32, 28), (6, 16, 28), (6, 64, 28), (6, 32, 14), (6, 32, 56)]
COLUMNS: tuple[Column, ...] = (
    ("blocks", "depth", str), ("tokens", "tokens", str), ("steps", "steps", str),
    ("compute ms", "compute", lambda v: f"{v:.1f}"), ("/ bound", "compute_bound", lambda v: f"{v:.2f}"),
    ("predict ms", "predict", lambda v: f"{v:.1f}"), ("/ bound", "predict_bound", lambda v: f"{v:.2f}"),
    ("run ms", "run", lambda v: f"{v:.0f}"), ("run / (computed + predicted steps)", "ideal", lambda v: f"{v:.3f}"),
    ("cold compile s", "compile", lambda v: f"{v:.1f}"), ("operations predicted", "operations", str),
    ("cache MiB", "bytes", mebibytes),
)  # fmt: skip


@torch.no_grad()
def measure(depth: int, side: int, steps: int, device: str, peaks: Peaks) -> dict[str, Any]:
    from diffusers import DiTTransformer2DModel

    pay_once(device)
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=8,
        attention_head_dim=64,
        in_channels=4,
        num_layers=depth,
        sample_size=side,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    model = model.eval().requires_grad_(False).to(device)
    cache = {
        "method": "taylorseer",
        **TAYLOR,
        "cache_identifiers": [r"transformer_blocks\.\d+\.attn1"],
        "taylor_factors_dtype": None,
    }
    compiled = torch.compile(
        model, backend="cached_inductor", fullgraph=True, options={"cache": cache, "num_inference_steps": steps}
    )
    latent, label = torch.randn(1, 4, side, side, device=device), torch.tensor([3], device=device)

    def inputs(step: int) -> dict[str, Any]:
        return {
            "hidden_states": latent * (1 - 0.01 * step),
            "class_labels": label,
            "timestep": torch.tensor([990 - 10 * step], device=device),
        }

    start = time.perf_counter()
    cachepass.warmup(compiled, **inputs(0), progress=False)
    seconds = time.perf_counter() - start
    times: dict[str, list[float]] = {"compute": [], "predict": []}
    runs = []
    for round_ in range(4):
        total = 0.0
        for step in range(steps):
            call = inputs(step)
            synchronize(device)
            start = time.perf_counter()
            compiled(**call)
            synchronize(device)
            taken = time.perf_counter() - start
            total += taken
            if round_:
                times[taylor_phase(step)].append(1000 * taken)
        runs += [1000 * total] if round_ else []
    medians = {phase: statistics.median(values) for phase, values in times.items()}
    program = next(programs_of(compiled))[0].program
    assert program is not None
    variants = {name: program.specialized(phase) for name, phase in zip(medians, program.plan.phases, strict=True)}
    bounds = {name: 1000 * cost_of(variant.gm).seconds(peaks) for name, variant in variants.items()}
    run, ideal = statistics.median(runs), sum(medians[taylor_phase(step)] for step in range(steps))
    operations = sum(node.op == "call_function" for node in variants["predict"].gm.graph.nodes)
    return {
        "depth": depth,
        "tokens": (side // 2) ** 2,
        "steps": steps,
        **medians,
        "compute_bound": medians["compute"] / bounds["compute"],
        "predict_bound": medians["predict"] / bounds["predict"],
        "run": run,
        "ideal": run / ideal,
        "compile": seconds,
        "operations": operations,
        "bytes": cachepass.summary(compiled).cache_bytes,
    }


@click.command()
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--out", default=None, type=click.Path(path_type=Path), help="JSON file to write.")
def main(device: str, out: Path | None) -> None:
    """Measure, print the markdown table; with --out, write the JSON."""
    os.environ.update(KEEP_FREED)
    spawn = multiprocessing.get_context("spawn")
    rows, peaks = [], measure_peaks(device, torch.float32)
    for config in track(CONFIGS, "measuring"):
        with tempfile.TemporaryDirectory(prefix="cachepass-benchmark-") as folder:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
            with ProcessPoolExecutor(1, spawn) as process:
                rows.append(process.submit(measure, *config, device, peaks).result())
    results = {"TaylorSeer on the attentions of a DiT, 512 wide": rows}
    publish(results, COLUMNS, device, "torch.float32", out)


if __name__ == "__main__":
    main()
