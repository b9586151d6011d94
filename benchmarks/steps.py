"""Steps and runs of cached models against what a user would pick instead, interleaved in one run.

    python benchmarks/steps.py                                     # all shapes and methods, on the device at hand
    python benchmarks/steps.py --shape flux --method taylorseer --rounds 7

Every subject runs the same schedule on the same inputs, in a process of its own; one works at a time. A round runs
every subject once, in turn, so drift of the machine's speed hits all alike; medians over the rounds are reported, with
ratios to plain Inductor and to diffusers' hooks under torch.compile from the same rounds. Writes
``benchmarks/results/<device>-<date>.json`` and prints the markdown table that docs/performance.md holds.
"""

from __future__ import annotations

import datetime
import json
import logging
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import torch
from report import markdown
from rich.progress import Progress
from shapes import SHAPES, build, count_flops, step_inputs, timestep_of

import cachepass
from cachepass.testing import count_compiles

RESULTS = Path(__file__).parent / "results"
STEPS = 12
TAYLOR: dict[str, Any] = {"cache_interval": 4, "disable_cache_before_step": 2, "max_order": 1}
PAB: dict[str, Any] = {"spatial_attention_block_skip_range": 3}
ALWAYS = (-1, 1001)
FASTER: dict[str, Any] = {
    "unconditional_batch_skip_range": 5, "unconditional_batch_timestep_skip_range": ALWAYS,
    "spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (-1, 681),
}  # fmt: skip
FORMATS = {"cogvideox": "BFCHW", "dit": "BCHW"}  # shapes that carry a guidance batch
GUIDED = ("fastercache",)


@dataclass
class Subject:
    """One way to run a model.

    ``phase(step)`` says what the step is: ``"compute"`` or ``"predict"`` (None: not known from outside).
    """

    name: str
    call: Callable[..., Any]
    reset: Callable[[], None]
    phase: Callable[[int], str | None]
    cache_bytes: Callable[[], int | None] = lambda: None


@dataclass
class Measured:
    """What was measured of a subject. Times in seconds."""

    name: str
    first_run: float
    graphs: int
    graph_breaks: int
    recompiles: int
    steps: dict[str, list[float]] = field(default_factory=dict)
    runs: list[float] = field(default_factory=list)
    cache_bytes: int | None = None


def taylor_phase(step: int) -> str:
    before, interval = TAYLOR["disable_cache_before_step"], TAYLOR["cache_interval"]
    return "compute" if step < before or (step - before - 1) % interval == 0 else "predict"


def pab_phase(step: int) -> str:
    skip = step > 0 and 100 < timestep_of(step, STEPS) < 800 and step % PAB["spatial_attention_block_skip_range"] != 0
    return "predict" if skip else "compute"


def faster_phase(step: int) -> str:
    """``"compute"``: the whole batch; ``"skip"``: its conditional half; ``"predict"``: attentions forecast too."""
    if step % FASTER["unconditional_batch_skip_range"] == 0:
        return "compute"
    predicted = step % FASTER["spatial_attention_block_skip_range"] != 0 and timestep_of(step, STEPS) < 681
    return "predict" if predicted else "skip"


PHASES: dict[str, Callable[[int], str]] = {
    "taylorseer": taylor_phase, "taylorseer-blocks": taylor_phase, "pab": pab_phase, "fastercache": faster_phase,
}  # fmt: skip


# ---- the subjects ---------------------------------------------------------------------------------------------------


def plain(shape: str, method: str, place: tuple[str, torch.dtype]) -> Subject:  # noqa: ARG001
    compiled = torch.compile(build(shape, *place), fullgraph=True)
    return Subject("plain Inductor", compiled, lambda: None, lambda _: "compute")


def ours(lowering: str) -> Callable[..., Subject]:
    def make(shape: str, method: str, place: tuple[str, torch.dtype]) -> Subject:
        if method == "taylorseer":
            cache = {"method": method, **TAYLOR, "cache_identifiers": [SHAPES[shape].attention],
                     "taylor_factors_dtype": place[1]}  # fmt: skip
        elif method == "pab":
            cache = {"method": method, **PAB}
        else:
            cache = {"method": method, **FASTER, "tensor_format": FORMATS[shape]}
        options = {"cache": cache, "lowering": lowering, "timestep_scale": SHAPES[shape].unit,
                   "num_inference_steps": STEPS}  # fmt: skip
        compiled = torch.compile(build(shape, *place), backend="cached_inductor", fullgraph=True, options=options)

        def cache_bytes() -> int:
            summary = cachepass.summary(compiled)
            assert summary.cache_bytes == summary.planned_bytes, "the plan says every byte"
            return summary.cache_bytes

        return Subject(f"cachepass ({lowering})", compiled, lambda: cachepass.reset(compiled), PHASES[method],
                       cache_bytes)  # fmt: skip

    return make


def hooks(compile_it: bool) -> Callable[..., Subject]:
    """Diffusers' own hooks, eager or under torch.compile (which breaks the graph at each of them)."""

    def make(shape: str, method: str, place: tuple[str, torch.dtype]) -> Subject:
        import diffusers
        from diffusers.hooks import (
            HookRegistry,
            apply_faster_cache,
            apply_pyramid_attention_broadcast,
            apply_taylorseer_cache,
        )
        from diffusers.hooks.hooks import CacheContext, _set_cache_context

        model, now = build(shape, *place), [0.0]
        if method == "taylorseer":
            config = diffusers.TaylorSeerCacheConfig(
                **TAYLOR, cache_identifiers=[SHAPES[shape].attention], taylor_factors_dtype=place[1]
            )
            apply_taylorseer_cache(model, config)
        elif method == "fastercache":
            config = diffusers.FasterCacheConfig(
                **FASTER, tensor_format=FORMATS[shape], current_timestep_callback=lambda: now[0]
            )
            apply_faster_cache(model, config)
        else:
            config = diffusers.PyramidAttentionBroadcastConfig(**PAB, current_timestep_callback=lambda: now[0])
            apply_pyramid_attention_broadcast(model, config)
        function = torch.compile(model) if compile_it else model

        def call(**inputs: Any) -> Any:
            now[0] = float(inputs["timestep"][0]) * SHAPES[shape].unit
            _set_cache_context(model, CacheContext("benchmark"))
            return function(**inputs)

        def reset() -> None:
            HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks(recurse=True)

        return Subject(f"diffusers hooks{' + torch.compile' if compile_it else ', eager'}", call, reset, PHASES[method],
                       lambda: _tensors_of_hooks(model))  # fmt: skip

    return make


def _tensors_of_hooks(model: torch.nn.Module) -> int:
    """Bytes of the memory that the hooks keep alive (a view keeps all of its tensor's)."""
    storages: dict[int, int] = {}
    for module in model.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            manager = getattr(hook, "state_manager", None)
            states = [hook.state] if manager is None else list(manager._state_cache.values())
            for state in states:
                names = ("cache", "taylor_factors", "low_frequency_delta", "high_frequency_delta")
                for tensor in _flatten([getattr(state, name, None) for name in names]):
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


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
    return Subject("cache-dit + compile_repeated_blocks", model, lambda: None, lambda _: None)


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
    "fastercache": [plain, ours("specialize"), ours("cond"), hooks(False), hooks(True)],
}


# ---- measuring ------------------------------------------------------------------------------------------------------


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def run_once(
    subject: Subject, shape: str, place: tuple[str, torch.dtype], *, guided: bool
) -> list[tuple[str | None, float]]:
    """One run: the phase and the seconds of each step."""
    subject.reset()
    steps = []
    for step in range(STEPS):
        inputs = step_inputs(shape, step, STEPS, *place, guided=guided)
        _synchronize(place[0])
        start = time.perf_counter()
        subject.call(**inputs)
        _synchronize(place[0])
        steps.append((subject.phase(step), time.perf_counter() - start))
    return steps


def worker(pipe: Connection, method: str, index: int, shape: str, place: tuple[str, torch.dtype]) -> None:
    """A subject in a process of its own: Dynamo keeps state per code object, so subjects would disturb each other.

    Answers "first" (a run from empty caches: everything that a run needs is compiled in it) with the time and the
    compile counts, "run" with the steps, "bytes" with the cache's size. Ends at None.
    """
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    # At the default limit of 8 Dynamo gives hooks up; this is in their favour.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.accumulated_recompile_limit = 1024
    with tempfile.TemporaryDirectory(prefix="cachepass-benchmark-") as folder, torch.no_grad():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        torch.compile(lambda x: x.sin() + 1)(torch.ones(64, 64, device=place[0]))  # what a process pays once
        subject, guided = SUBJECTS[method][index](shape, method, place), method in GUIDED
        pipe.send(None if subject is None else subject.name)
        while subject is not None and (command := pipe.recv()) is not None:
            if command == "first":
                with count_compiles() as counts:
                    seconds = sum(s for _, s in run_once(subject, shape, place, guided=guided))
                pipe.send((seconds, counts.graphs, counts.graph_breaks, counts.recompiles))
            elif command == "run":
                pipe.send(run_once(subject, shape, place, guided=guided))
            else:
                pipe.send(subject.cache_bytes())


def measure(shape: str, method: str, place: tuple[str, torch.dtype], rounds: int, progress: Progress) -> list[Measured]:
    task = progress.add_task(f"{shape}, {method}", total=len(SUBJECTS[method]) + rounds)
    context = multiprocessing.get_context("spawn")
    measured: list[tuple[Connection, Measured]] = []
    processes = []
    for index in range(len(SUBJECTS[method])):
        pipe, other = context.Pipe()
        processes.append(context.Process(target=worker, args=(other, method, index, shape, place), daemon=True))
        processes[-1].start()
        name = pipe.recv()
        if name is not None:
            measured.append((pipe, Measured(name, *_ask(pipe, "first"))))
            _ask(pipe, "run")
        progress.advance(task)
    for _ in range(rounds):
        for pipe, subject in measured:
            steps = _ask(pipe, "run")
            subject.runs.append(sum(seconds for _, seconds in steps))
            for phase, seconds in steps:
                if phase is not None:
                    subject.steps.setdefault(phase, []).append(seconds)
        progress.advance(task)
    for pipe, subject in measured:
        subject.cache_bytes = _ask(pipe, "bytes")
        pipe.send(None)
    for process in processes:
        process.join()
    return [subject for _, subject in measured]


def _ask(pipe: Connection, command: str) -> Any:
    pipe.send(command)
    return pipe.recv()


def row(subject: Measured, subjects: list[Measured], ideal: float | None) -> dict[str, Any]:
    """One line of the table: medians in ms, and ratios from the same rounds."""
    base = subjects[0]
    peer = next((s for s in subjects if s.name.endswith("torch.compile")), None)

    def median(s: Measured, phase: str) -> float | None:
        return 1000 * statistics.median(s.steps[phase]) if s.steps.get(phase) else None

    compute, skip, predict = (median(subject, phase) for phase in ("compute", "skip", "predict"))
    plain_step = median(base, "compute")
    peer_skip, peer_predict = (None if peer is None else median(peer, phase) for phase in ("skip", "predict"))
    cold, cold_plain = (s.first_run - statistics.median(s.runs) if s.graphs else None for s in (subject, base))
    return {
        "subject": subject.name, "compute_ms": compute, "skip_ms": skip, "predict_ms": predict,
        "run_ms": 1000 * statistics.median(subject.runs),
        "compute_vs_plain": compute and plain_step and compute / plain_step,
        "predict_vs_compiled_hooks": predict and peer_predict and predict / peer_predict,
        "skip_vs_compute": skip and compute and skip / compute,
        "skip_vs_compiled_hooks": skip and peer_skip and skip / peer_skip,
        "run_vs_plain": statistics.median(a / b for a, b in zip(subject.runs, base.runs, strict=True)),
        "ideal_run_vs_plain": None if subject is base else ideal,
        "cold_compile_s": cold, "cold_compile_vs_plain": cold and cold_plain and cold / cold_plain,
        "graphs": subject.graphs, "graph_breaks": subject.graph_breaks, "recompiles": subject.recompiles,
        "cache_bytes": subject.cache_bytes,
    }  # fmt: skip


def ideal_run(shape: str) -> float:
    """A guided run under FasterCache over an uncached one, if time were floating-point operations."""
    flops = count_flops(shape)
    cost = {"compute": flops.full, "skip": flops.half, "predict": flops.half - flops.attention}
    return sum(cost[faster_phase(step)] for step in range(STEPS)) / (STEPS * flops.full)


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
    place = (device, getattr(torch, dtype or ("bfloat16" if device == "cuda" else "float32")))
    results = {}
    with Progress() as progress:
        for shape in shapes or SHAPES:
            for method in methods or SUBJECTS:
                if method in GUIDED and shape not in FORMATS:
                    continue  # it takes no guidance batch
                subjects = measure(shape, method, place, rounds, progress)
                ideal = ideal_run(shape) if method in GUIDED else None
                title = f"{method} on {shape} ({SHAPES[shape].about})"
                results[title] = [row(subject, subjects, ideal) for subject in subjects]
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
