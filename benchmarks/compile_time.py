"""Compile seconds, from empty caches and from warm ones, of whole models and block by block.

    python benchmarks/compile_time.py
    python benchmarks/compile_time.py --shape flux --method taylorseer --method pab

All programs that a run needs: ``cachepass.warmup``, or a run less the same run later. Ratios to plain Inductor from the
same call.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from report import Column, publish
from rich.progress import Progress
from shapes import SHAPES
from steps import row
from subjects import METHODS, Case
from worker import measure

COLUMNS: tuple[Column, ...] = (
    ("subject", "subject", str), ("cold s", "cold_compile_s", lambda v: f"{v:.1f}"),
    ("cold / plain", "cold_vs_plain", lambda v: f"{v:.2f}"), ("warm s", "warm_compile_s", lambda v: f"{v:.1f}"),
    ("warm / cold", "warm_vs_cold", lambda v: f"{v:.2f}"), ("graphs", "graphs", str),
    ("breaks", "graph_breaks", str), ("recompiles", "recompiles", str),
    ("run / plain", "run_vs_plain", lambda v: f"{v:.3f}"),
)  # fmt: skip


@click.command()
@click.option("--shape", default="flux", show_default=True, type=click.Choice(list(SHAPES)))
@click.option(
    "--method", "methods", multiple=True, type=click.Choice(METHODS), default=("taylorseer",), show_default=True
)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--out", default=None, type=click.Path(path_type=Path), help="JSON file to write.")
def main(shape: str, methods: tuple[str, ...], device: str, out: Path | None) -> None:
    """Measure, print the markdown table; with --out, write the JSON."""
    results: dict[str, Any] = {}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with Progress() as progress:
        for method in methods:
            case = Case(shape, method, device, dtype)
            subjects = measure(case, "compile time", 1, 2, progress)
            results[f"compiling {method} on {shape}"] = [row(case, subject, subjects) for subject in subjects]
    publish(results, COLUMNS, device, str(dtype), out)


if __name__ == "__main__":
    main()
