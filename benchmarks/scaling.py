"""How cost grows with depth, tokens and steps: TaylorSeer on the attentions of a DiT.

    python benchmarks/scaling.py

Each line is one model in this process: median step times, the bound beside them, cold compile seconds of all phases,
operations of the predicted program and cache bytes.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from typing import Any

import click
import torch
from bounds import cost_of, measure_peaks, synchronize
from report import Column, markdown, mebibytes
from rich.progress import track
from subjects import TAYLOR, taylor_phase

import cachepass
from cachepass.inspect.summary import programs_of

CONFIGS = [(3, 32, 28), (6, 32, 28), (12, 32, 28), (6, 16, 28), (6, 64, 28), (6, 32, 14), (6, 32, 56)]
COLUMNS: tuple[Column, ...] = (
    ("blocks", "depth", str), ("tokens", "tokens", str), ("steps", "steps", str),
    ("compute ms", "compute", lambda v: f"{v:.1f}"), ("/ bound", "compute_bound", lambda v: f"{v:.2f}"),
    ("predict ms", "predict", lambda v: f"{v:.1f}"), ("/ bound", "predict_bound", lambda v: f"{v:.2f}"),
    ("run ms", "run", lambda v: f"{v:.0f}"), ("run / (computed + predicted steps)", "ideal", lambda v: f"{v:.3f}"),
    ("cold compile s", "compile", lambda v: f"{v:.1f}"), ("operations predicted", "operations", str),
    ("cache MiB", "bytes", mebibytes),
)  # fmt: skip


def measure(depth: int, side: int, steps: int, device: str, peaks: Any) -> dict[str, Any]:
    from diffusers import DiTTransformer2DModel

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = DiTTransformer2DModel(num_attention_heads=8, attention_head_dim=64, in_channels=4, num_layers=depth,
                                  sample_size=side, patch_size=2, num_embeds_ada_norm=1000)  # fmt: skip
    model = model.eval().requires_grad_(False).to(device)
    cache = {"method": "taylorseer", **TAYLOR, "cache_identifiers": [r"transformer_blocks\.\d+\.attn1"],
             "taylor_factors_dtype": None}  # fmt: skip
    compiled = torch.compile(model, backend="cached_inductor", fullgraph=True,
                             options={"cache": cache, "num_inference_steps": steps})  # fmt: skip
    latent, label = torch.randn(1, 4, side, side, device=device), torch.tensor([3], device=device)

    def inputs(step: int) -> dict[str, Any]:
        return {"hidden_states": latent * (1 - 0.01 * step), "class_labels": label,
                "timestep": torch.tensor([990 - 10 * step], device=device)}  # fmt: skip

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
    return {"depth": depth, "tokens": (side // 2) ** 2, "steps": steps, **medians,
            "compute_bound": medians["compute"] / bounds["compute"],
            "predict_bound": medians["predict"] / bounds["predict"], "run": run, "ideal": run / ideal,
            "compile": seconds, "operations": operations,
            "bytes": cachepass.summary(compiled).cache_bytes}  # fmt: skip


@click.command()
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(device: str) -> None:
    """Measure and print the markdown table."""
    rows = []
    with torch.no_grad():
        peaks = measure_peaks(device, torch.float32)
        torch.compile(lambda x: x.sin() + 1)(torch.ones(64, 64, device=device))  # what a process pays once
        for depth, side, steps in track(CONFIGS, "measuring"):
            with tempfile.TemporaryDirectory(prefix="cachepass-benchmark-") as folder:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
                rows.append(measure(depth, side, steps, device, peaks))
    print(markdown({"TaylorSeer on the attentions of a DiT, 512 wide": rows}, COLUMNS))


if __name__ == "__main__":
    main()
