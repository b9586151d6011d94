"""Archives against the compiled model: from the start of a process to its first step, host time, steps, bytes.

    python benchmarks/archive.py
    python benchmarks/archive.py --shape flux --steps 20

A model is exported, and compiled once so that Inductor's caches are warm. Then processes of their own, in turns, load
the archive or compile anew: from the start of the interpreter to the end of the first step, and a run. Weights come
from a file in both; medians over the processes. The shape ``toy`` is so small that a step is nearly all host time.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from report import Column, mebibytes, publish
from shapes import SHAPES, build, step_inputs
from subjects import TAYLOR
from worker import quiet

import cachepass

CHILD = Path(__file__).parent / "archive_child.py"
COLUMNS: tuple[Column, ...] = (
    ("shape", "shape", str), ("export s", "export_s", lambda v: f"{v:.0f}"), ("MiB", "bytes", mebibytes),
    ("programs", "programs", str), ("start to first step s", "start_s", lambda v: f"{v:.2f}"),
    ("compiled, warm", "compiled_start_s", lambda v: f"{v:.2f}"), ("ratio", "start_ratio", lambda v: f"{v:.3f}"),
    ("compute ms", "compute_ms", lambda v: f"{v:.2f}"), ("/ compiled", "compute_ratio", lambda v: f"{v:.3f}"),
    ("predict ms", "predict_ms", lambda v: f"{v:.2f}"), ("/ compiled", "predict_ratio", lambda v: f"{v:.3f}"),
)  # fmt: skip


def _calls(shape: str, steps: int) -> list[dict[str, Any]]:
    return [step_inputs(shape, step, steps, "cpu", torch.float32) for step in range(steps)]


def measure(shape: str, steps: int, processes: int, folder: Path) -> dict[str, Any]:
    """One row of the table."""
    model = build(shape, "cpu", torch.float32)
    calls = _calls(shape, steps)
    cache = {"method": "taylorseer", **TAYLOR, "cache_identifiers": [SHAPES[shape].attention]}
    options = {"num_inference_steps": steps, "timestep_scale": SHAPES[shape].unit}
    archive = folder / f"{shape}.cpz"
    made = cachepass.export(model, **calls[0], cache=cache, path=archive, options=options)
    torch.save(model.state_dict(), folder / "weights.pt")
    torch.save(calls, folder / "calls.pt")
    settings = {"shape": shape, "cache": cache, "options": options, "archive": str(archive), "folder": str(folder)}
    (folder / "settings.json").write_text(json.dumps(settings))
    _child("compiled", folder)  # its caches are warm from now on
    found: dict[str, list[dict[str, float]]] = {"loaded": [], "compiled": []}
    for _ in range(processes):
        for kind, rows in found.items():
            rows.append(_child(kind, folder))
    loaded, compiled = (
        {key: statistics.median(row[key] for row in rows) for key in rows[0]} for rows in found.values()
    )
    return {
        "shape": f"{shape}: {SHAPES[shape].about}", "export_s": made.seconds, "bytes": made.bytes,
        "programs": len(made.programs), "start_s": loaded["start"], "compiled_start_s": compiled["start"],
        "start_ratio": loaded["start"] / compiled["start"],
        **{f"{phase}_ms": 1000 * loaded[phase] for phase in ("compute", "predict")},
        **{f"{phase}_ratio": loaded[phase] / compiled[phase] for phase in ("compute", "predict")},
    }  # fmt: skip


def _child(kind: str, folder: Path) -> dict[str, float]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    start = time.time()
    command = [sys.executable, str(CHILD), kind, str(folder)]
    told = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    return {**told, "start": told["first"] - start}


@click.command()
@click.option("--shape", "shapes", multiple=True, default=("toy", "flux-18"), type=click.Choice(list(SHAPES)))
@click.option("--steps", default=16, show_default=True, type=click.IntRange(8))
@click.option("--processes", default=3, show_default=True, type=click.IntRange(1), help="Of each kind, that count.")
@click.option("--out", default=None, type=click.Path(path_type=Path), help="JSON file to write.")
def main(shapes: tuple[str, ...], steps: int, processes: int, out: Path | None) -> None:
    """Export, load, compare; print the markdown table."""
    quiet()
    rows = []
    for shape in shapes:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(shape, steps, processes, Path(folder)))
            click.echo(f"{shape}: {rows[-1]}", err=True)
    publish({"archives": rows}, COLUMNS, "cpu", "float32", out)


if __name__ == "__main__":
    main()
