"""Results as markdown tables and as JSON."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def _digits(n: int) -> Callable[[Any], str]:
    return lambda value: f"{value:.{n}f}"


def mebibytes(value: int) -> str:
    return f"{value / 2**20:.1f}"


Column = tuple[str, str, Callable[[Any], str]]  # heading, key, form
STEP_COLUMNS: tuple[Column, ...] = (
    ("subject", "subject", str), ("compute ms", "compute_ms", _digits(1)), ("skip ms", "skip_ms", _digits(1)),
    ("predict ms", "predict_ms", _digits(1)), ("run ms", "run_ms", _digits(0)),
    ("compute / plain", "compute_vs_plain", _digits(3)), ("skip / compiled hooks", "skip_vs_hooks", _digits(3)),
    ("predict / compiled hooks", "predict_vs_hooks", _digits(3)),
    ("compute / bound", "compute_vs_bound", _digits(2)), ("skip / bound", "skip_vs_bound", _digits(2)),
    ("predict / bound", "predict_vs_bound", _digits(2)), ("run / plain", "run_vs_plain", _digits(3)),
    ("run / ideal", "run_vs_ideal", _digits(3)), ("run / best hooks", "run_vs_best_hooks", _digits(3)),
    ("difference", "difference", lambda value: f"{value:.0e}"),
    ("cold compile s", "cold_compile_s", _digits(1)), ("cold / plain", "cold_vs_plain", _digits(2)),
    ("warm / cold", "warm_vs_cold", _digits(2)), ("graphs", "graphs", str), ("breaks", "graph_breaks", str),
    ("recompiles", "recompiles", str), ("cache MiB", "cache_bytes", mebibytes), ("peak MiB", "peak_bytes", mebibytes),
)  # fmt: skip


def markdown(results: dict[str, list[dict[str, Any]]], columns: tuple[Column, ...]) -> str:
    """One table for each entry of ``results``; columns without a value in any of its rows are left out."""
    lines = []
    for title, rows in results.items():
        shown = [c for c in columns if any(r.get(c[1]) is not None for r in rows)]
        lines += [f"**{title}**", "", "| " + " | ".join(c[0] for c in shown) + " |", "|---" * len(shown) + "|"]
        for r in rows:
            cells = ["" if r.get(key) is None else form(r[key]) for _, key, form in shown]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def publish(
    results: dict[str, list[dict[str, Any]]], columns: tuple[Column, ...], device: str, dtype: str, out: Path | None
) -> None:
    """Print the tables; with ``out``, write the JSON."""
    print(markdown(results, columns))
    if out is not None:
        write(results, device, dtype, out)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name().lower().replace(" ", "-") if device == "cuda" else "cpu"


def results_path(device: str, what: str = "") -> Path:
    """Where today's results for the device at hand are kept; ``what`` they are of, if not of steps."""
    return RESULTS / f"{device_name(device)}-{datetime.date.today().isoformat()}{what}.json"


def write(results: dict[str, Any], device: str, dtype: str, out: Path | None, **about: Any) -> Path:
    """The results as JSON, with what they were measured on."""
    name, today = device_name(device), datetime.date.today().isoformat()
    path = out or results_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    about |= {
        "date": today,
        "device": name,
        "dtype": dtype,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    path.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    return path
