"""Steps and runs of cached models against what a user would pick instead, interleaved in one process.

    python benchmarks/steps.py                                     # all shapes and methods, on the device at hand
    python benchmarks/steps.py --shape flux --method taylorseer --rounds 7

Every subject runs the same schedule on the same inputs. A round runs every subject once, in turn, so drift of the
machine's speed hits all alike; medians over the rounds are reported, with ratios to plain Inductor and to diffusers'
hooks under torch.compile from the same rounds. Writes ``benchmarks/results/<device>-<date>.json`` and prints the
markdown table that docs/performance.md holds.
"""

from __future__ import annotations

import datetime
import gc
import json
import logging
import os
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from rich.progress import Progress
from shapes import SHAPES, build, step_inputs

import cachepass
from cachepass.testing import count_compiles

RESULTS = Path(__file__).parent / "results"
STEPS = 12
TAYLOR: dict[str, Any] = {"cache_interval": 4, "disable_cache_before_step": 2, "max_order": 1}
PAB: dict[str, Any] = {"spatial_attention_block_skip_range": 3}


@dataclass
class Subject:
    """One way to run a model, and what was measured of it.

    ``phase(step)`` says what the step is: ``"compute"`` or ``"predict"``.
    """

    name: str
    call: Callable[..., Any]
    reset: Callable[[], None]
    phase: Callable[[int], str]
    cache_bytes: Callable[[], int | None] = lambda: None
    compile_seconds: float = 0.0
    graphs: int = 0
    graph_breaks: int = 0
    recompiles: int = 0
    cache_dir: str = ""
    steps: dict[str, list[float]] = field(default_factory=dict)
    runs: list[float] = field(default_factory=list)


def taylor_phase(step: int) -> str:
    before, interval = TAYLOR["disable_cache_before_step"], TAYLOR["cache_interval"]
    return "compute" if step < before or (step - before - 1) % interval == 0 else "predict"


def pab_phase(step: int) -> str:
    timestep = 950.0 - 900.0 * step / STEPS
    skip = step > 0 and 100 < timestep < 800 and step % PAB["spatial_attention_block_skip_range"] != 0
    return "predict" if skip else "compute"


# ---- the subjects ---------------------------------------------------------------------------------------------------


def plain(shape: str, method: str, place: tuple[str, torch.dtype]) -> Subject:  # noqa: ARG001
    compiled = torch.compile(build(shape, *place), fullgraph=True)
    return Subject("plain Inductor", compiled, lambda: None, lambda _: "compute")


def ours(lowering: str) -> Callable[..., Subject]:
    def make(shape: str, method: str, place: tuple[str, torch.dtype]) -> Subject:
        if method == "taylorseer":
            cache = {"method": method, **TAYLOR, "cache_identifiers": [SHAPES[shape].attention],
                     "taylor_factors_dtype": place[1]}  # fmt: skip
        else:
            cache = {"method": method, **PAB}
        options = {"cache": cache, "lowering": lowering, "timestep_scale": SHAPES[shape].unit,
                   "num_inference_steps": STEPS}  # fmt: skip
        compiled = torch.compile(build(shape, *place), backend="cached_inductor", fullgraph=True, options=options)

        def cache_bytes() -> int:
            summary = cachepass.summary(compiled)
            assert summary.cache_bytes == summary.planned_bytes, "the plan says every byte"
            return summary.cache_bytes

        phase = taylor_phase if method == "taylorseer" else pab_phase
        return Subject(f"cachepass ({lowering})", compiled, lambda: cachepass.reset(compiled), phase, cache_bytes)

    return make


def hooks(compile_it: bool) -> Callable[..., Subject]:
    """Diffusers' own hooks, eager or under torch.compile (which breaks the graph at each of them)."""

    def make(shape: str, method: str, place: tuple[str, torch.dtype]) -> Subject:
        import diffusers
        from diffusers.hooks import HookRegistry, apply_pyramid_attention_broadcast, apply_taylorseer_cache
        from diffusers.hooks.hooks import CacheContext, _set_cache_context

        model, now = build(shape, *place), [0.0]
        if method == "taylorseer":
            config = diffusers.TaylorSeerCacheConfig(
                **TAYLOR, cache_identifiers=[SHAPES[shape].attention], taylor_factors_dtype=place[1]
            )
            apply_taylorseer_cache(model, config)
        else:
            config = diffusers.PyramidAttentionBroadcastConfig(**PAB, current_timestep_callback=lambda: now[0])
            apply_pyramid_attention_broadcast(model, config)
        function = torch.compile(model) if compile_it else model

        def call(**inputs: Any) -> Any:
            now[0] = float(inputs["timestep"]) * SHAPES[shape].unit
            _set_cache_context(model, CacheContext("benchmark"))
            return function(**inputs)

        def reset() -> None:
            HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks(recurse=True)

        phase = taylor_phase if method == "taylorseer" else pab_phase
        return Subject(f"diffusers hooks{' + torch.compile' if compile_it else ', eager'}", call, reset, phase,
                       lambda: _tensors_of_hooks(model))  # fmt: skip

    return make


def _tensors_of_hooks(model: torch.nn.Module) -> int:
    """Bytes of what the hooks keep."""
    total = 0
    for module in model.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            manager = getattr(hook, "state_manager", None)
            states = [hook.state] if manager is None else list(manager._state_cache.values())
            for state in states:
                kept = getattr(state, "cache", None), getattr(state, "taylor_factors", None)
                total += sum(t.numel() * t.element_size() for t in _flatten(kept))
    return total


def _flatten(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in _flatten(v)] if isinstance(value, (list, tuple)) else []


def cache_dit(shape: str, method: str, place: tuple[str, torch.dtype]) -> Subject | None:
    """cache-dit with the same computed steps and its Taylor calibrator; it forecasts whole block ranges.

    So it skips more per predicted step than an attention-level method: compare it with "blocks" below.
    """
    if method != "taylorseer-blocks":
        return None
    try:
        import cache_dit as package
    except ImportError:
        return None
    model = build(shape, *place)
    mask = [1 if taylor_phase(step) == "compute" else 0 for step in range(STEPS)]
    config = package.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, num_inference_steps=STEPS,
                                   steps_computation_mask=mask, steps_computation_policy="static")  # fmt: skip
    calibrator = package.TaylorSeerCalibratorConfig(taylorseer_order=TAYLOR["max_order"])
    package.enable_cache(model, cache_config=config, calibrator_config=calibrator)
    model.compile_repeated_blocks()
    # It begins a new run by itself after num_inference_steps calls.
    return Subject("cache-dit + compile_repeated_blocks", model, lambda: None, taylor_phase)


def blocks(shape: str, method: str, place: tuple[str, torch.dtype]) -> Subject | None:
    """TaylorSeer on whole blocks, as cache-dit does it."""
    if method != "taylorseer-blocks":
        return None
    cache = {"method": "taylorseer", **TAYLOR, "cache_identifiers": [r"[^.]*transformer_blocks\.[1-9]\d*"],
             "taylor_factors_dtype": place[1]}  # fmt: skip
    options = {"cache": cache, "num_inference_steps": STEPS}
    compiled = torch.compile(build(shape, *place), backend="cached_inductor", fullgraph=True, options=options)
    return Subject("cachepass (specialize)", compiled, lambda: cachepass.reset(compiled), taylor_phase,
                   lambda: cachepass.summary(compiled).cache_bytes)  # fmt: skip


SUBJECTS: dict[str, list[Callable[..., Subject | None]]] = {
    "taylorseer": [plain, ours("specialize"), ours("cond"), hooks(False), hooks(True)],
    "pab": [plain, ours("specialize"), hooks(False), hooks(True)],
    "taylorseer-blocks": [plain, blocks, cache_dit],
}


# ---- measuring ------------------------------------------------------------------------------------------------------


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def run_once(subject: Subject, shape: str, place: tuple[str, torch.dtype], record: bool) -> None:
    subject.reset()
    spent = 0.0
    for step in range(STEPS):
        inputs = step_inputs(shape, step, STEPS, *place)
        _synchronize(place[0])
        start = time.perf_counter()
        subject.call(**inputs)
        _synchronize(place[0])
        seconds = time.perf_counter() - start
        spent += seconds
        if record:
            subject.steps.setdefault(subject.phase(step), []).append(seconds)
    if record:
        subject.runs.append(spent)


def compile_subject(subject: Subject, shape: str, place: tuple[str, torch.dtype]) -> None:
    """The first run, from empty caches: everything that a run needs is compiled in it.

    The table's cold compile is this time less that of a later run.
    """
    subject.cache_dir = tempfile.mkdtemp(prefix="cachepass-benchmark-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = subject.cache_dir
    with count_compiles() as counts:
        start = time.perf_counter()
        run_once(subject, shape, place, record=False)
        subject.compile_seconds = time.perf_counter() - start
    subject.graphs, subject.graph_breaks, subject.recompiles = counts.graphs, counts.graph_breaks, counts.recompiles


def measure(shape: str, method: str, place: tuple[str, torch.dtype], rounds: int, progress: Progress) -> list[Subject]:
    subjects = []
    task = progress.add_task(f"{shape}, {method}", total=len(SUBJECTS[method]) + rounds)
    for make in SUBJECTS[method]:
        subject = make(shape, method, place)
        if subject is not None:
            compile_subject(subject, shape, place)
            subjects.append(subject)
        progress.advance(task)
    for subject in subjects:  # Dynamo was reset for each of them: capture again, from Inductor's now warm caches
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = subject.cache_dir
        run_once(subject, shape, place, record=False)
        run_once(subject, shape, place, record=False)
        shutil.rmtree(subject.cache_dir, ignore_errors=True)
    gc.collect()
    for _ in range(rounds):
        for subject in subjects:
            run_once(subject, shape, place, record=True)
        progress.advance(task)
    return subjects


def row(subject: Subject, subjects: list[Subject]) -> dict[str, Any]:
    """One line of the table: medians in ms, and ratios from the same rounds."""
    base = subjects[0]
    peer = next((s for s in subjects if s.name.endswith("torch.compile")), None)

    def median(s: Subject, phase: str) -> float | None:
        return 1000 * statistics.median(s.steps[phase]) if s.steps.get(phase) else None

    compute, predict = median(subject, "compute"), median(subject, "predict")
    plain_step = median(base, "compute")
    peer_predict = None if peer is None else median(peer, "predict")
    cold, cold_plain = (s.compile_seconds - statistics.median(s.runs) for s in (subject, base))
    return {
        "subject": subject.name, "compute_ms": compute, "predict_ms": predict,
        "run_ms": 1000 * statistics.median(subject.runs),
        "compute_vs_plain": compute and plain_step and compute / plain_step,
        "predict_vs_compiled_hooks": predict and peer_predict and predict / peer_predict,
        "run_vs_plain": statistics.median(a / b for a, b in zip(subject.runs, base.runs, strict=True)),
        "cold_compile_s": cold,
        "cold_compile_vs_plain": cold / cold_plain,
        "graphs": subject.graphs, "graph_breaks": subject.graph_breaks, "recompiles": subject.recompiles,
        "cache_bytes": subject.cache_bytes(),
    }  # fmt: skip


def markdown(results: dict[str, list[dict[str, Any]]]) -> str:
    head = ("subject", "compute ms", "predict ms", "run ms", "compute / plain", "predict / compiled hooks",
            "run / plain", "cold compile s", "/ plain", "graphs", "breaks", "recompiles", "cache MiB")  # fmt: skip
    lines = []
    for title, rows in results.items():
        lines += [f"**{title}**", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for r in rows:
            size = None if r["cache_bytes"] is None else r["cache_bytes"] / 2**20
            cells = [r["subject"], _n(r["compute_ms"], 1), _n(r["predict_ms"], 1), _n(r["run_ms"], 0),
                     _n(r["compute_vs_plain"], 3), _n(r["predict_vs_compiled_hooks"], 3), _n(r["run_vs_plain"], 3),
                     _n(r["cold_compile_s"], 1), _n(r["cold_compile_vs_plain"], 2), str(r["graphs"]),
                     str(r["graph_breaks"]), str(r["recompiles"]), _n(size, 1)]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _n(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


@click.command()
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(SHAPES)), help="Default: all.")
@click.option("--method", "methods", multiple=True, type=click.Choice(list(SUBJECTS)), help="Default: all.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--dtype", default=None, type=click.Choice(["float32", "bfloat16"]), help="Default: bfloat16 on CUDA.")
@click.option("--out", default=None, type=click.Path(path_type=Path), help="JSON file to write.")
def main(shapes: tuple[str, ...], methods: tuple[str, ...], rounds: int, device: str, dtype: str | None,
         out: Path | None) -> None:  # fmt: skip
    """Measure, print the markdown table and write the JSON."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    place = (device, getattr(torch, dtype or ("bfloat16" if device == "cuda" else "float32")))
    results = {}
    with torch.no_grad(), Progress() as progress:
        for shape in shapes or SHAPES:
            for method in methods or SUBJECTS:
                torch._dynamo.reset()
                subjects = measure(shape, method, place, rounds, progress)
                title = f"{method} on {shape} ({SHAPES[shape].about})"
                results[title] = [row(subject, subjects) for subject in subjects]
    name = torch.cuda.get_device_name().lower().replace(" ", "-") if device == "cuda" else "cpu"
    today = datetime.date.today().isoformat()
    path = out or RESULTS / f"{name}-{today}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"date": today, "device": name, "dtype": str(place[1]), "torch": torch.__version__, "rounds": rounds,
             "steps": STEPS, "threads": torch.get_num_threads(), "machine": platform.machine()}  # fmt: skip
    path.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    print(markdown(results))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
