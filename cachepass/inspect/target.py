"""A model on a GPU that is not at hand: the estimate in words, and over a run.

run_seconds  : Findings, calls of a run -> what they take on the GPU, with the cache and without
target_table : Findings, calls of a run -> the text of ``explain(..., target=...)``
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..gpu.estimate import GpuEstimate, Kernels
from ..program.phases import phase_name
from .findings import Findings
from .report.cost import least_phase
from .tables import human_bytes, human_flops, human_seconds, table
from .timeline import SimulatedCall

NO_MEASUREMENT = "an estimate, not a measurement"
_SHOWN = 8


@dataclass(frozen=True)
class RunEstimate:
    """A run on a GPU, in seconds: with the cache, at most and at least, as the data decide; and without."""

    cached: float
    least: float
    plain: float

    @property
    def speedup(self) -> tuple[float, float]:
        """How many times faster the run is with the cache: at least, and at most."""
        return self.plain / self.cached, self.plain / self.least

    def __str__(self) -> str:
        least, most = (f"{factor:.2f}" for factor in self.speedup)
        span = least if least == most else f"{least} to {most}"
        return (
            f"{human_seconds(self.plain)} without a cache, {human_seconds(self.cached)} with it: {span} times as fast"
        )


def run_seconds(explanation: Findings, calls: Sequence[SimulatedCall]) -> RunEstimate:
    """The calls of a run on the GPU that the model was explained for. What is computed once per run is paid by the
    first call of each context that runs the model."""
    target, groups = _target(explanation), explanation.plan.groups
    cached = least = 0.0
    paid: set[tuple[str, bool]] = set()
    for call in calls:
        once, key = 0.0, (call.context, call.phase.route.half)
        name = "half/once" if call.phase.route.half else "once"
        if name in target.programs and key not in paid and target.launches(phase_name(call.phase, groups)):
            once = target.seconds(name)
            paid.add(key)
        cached += once + target.seconds(phase_name(call.phase, groups))
        least += once + target.seconds(phase_name(least_phase(call, explanation), groups))
    return RunEstimate(cached, least, len(calls) * target.seconds("plain"))


def _target(explanation: Findings) -> GpuEstimate:
    assert explanation.target is not None, "explained for no GPU"
    return explanation.target


def phase_rows(target: GpuEstimate) -> Iterator[tuple[str, ...]]:
    """A row for each phase, and for what no phase is: name, launches, of them kernels of Inductor's, bytes, FLOPs,
    time, and the time as a share of the plain program's."""
    names = ["plain", *target.calls, *(name for name in target.programs if name.endswith("once"))]
    for name in names:
        launches = [launch for program in target.of(name) for launch in program.launches]
        seconds = target.seconds(name)
        yield (
            name,
            str(len(launches)),
            str(sum(launch.fused for launch in launches)),
            human_bytes(target.bytes_moved(name)),
            human_flops(target.flops(name)),
            human_seconds(seconds),
            f"{seconds / target.seconds('plain'):.2f}",
        )


PHASE_COLUMNS = ("phase", "launches", "fused", "read and written", "FLOPs", "estimate", "of plain")
KERNEL_COLUMNS = (
    "kernel or operation",
    "calls",
    "estimate",
    "read",
    "written",
    "FLOPs",
    "registers",
    "stack",
    "module",
)


def kernel_row(row: Kernels) -> tuple[str, ...]:
    """All launches of a kernel."""
    launch, code = row.launch, row.code
    sizes = " " + ", ".join("x".join(map(str, shape)) for shape in launch.shapes) if launch.shapes else ""
    return (
        launch.name + sizes,
        str(row.count),
        human_seconds(row.seconds),
        human_bytes(launch.bytes_read),
        human_bytes(launch.bytes_written),
        human_flops(launch.flops) if launch.flops else "",
        "" if code is None else str(code.registers),
        "" if code is None else str(code.stack),
        launch.module,
    )


def memory_words(explanation: Findings) -> str:
    """What of the GPU's memory is used."""
    target = _target(explanation)
    kept = 0 if explanation.hoisted is None else explanation.hoisted.slot_bytes
    parts = [
        ("weights", target.weight_bytes),
        ("slots per context", explanation.cache_bytes),
        ("kept for a run", kept),
        ("activations", target.activation_bytes),
        ("activations without a cache", target.plain.activation_bytes),
    ]
    told = ", ".join(f"{name} {human_bytes(size)}" for name, size in parts if size)
    return f"{told}; it has {human_bytes(target.gpu.memory_bytes)}"


def target_table(explanation: Findings, calls: Sequence[SimulatedCall]) -> str:
    """The estimate for people."""
    target = _target(explanation)
    gpu = target.gpu
    text = table(PHASE_COLUMNS, phase_rows(target), title=f"{gpu.title}: {NO_MEASUREMENT}")
    shown = next(reversed(target.calls)) if target.calls else "plain"
    rows = [kernel_row(row) for row in target.kernels(shown)[:_SHOWN]]
    text += "\n" + table(KERNEL_COLUMNS, rows, title=f"what takes longest in {shown}", width=220)
    steps = len({call.step for call in calls})
    text += f"\nmemory: {memory_words(explanation)}\n"
    text += f"a run of {steps} steps: {run_seconds(explanation, calls)}\n"
    text += (
        f"({NO_MEASUREMENT}: each kernel at {gpu.bandwidth / 1e9:.0f} GB/s or the peak rate of its dtype, whichever "
        f"takes longer, and {1e6 * gpu.launch_seconds:.0f} us from one to the next)\n"
    )
    return text


def as_dict(explanation: Findings, calls: Sequence[SimulatedCall]) -> dict[str, Any]:
    """The estimate as plain values: bytes, FLOPs and seconds."""
    target = _target(explanation)
    run = run_seconds(explanation, calls)
    names = ["plain", *target.calls, *(name for name in target.programs if name.endswith("once"))]
    return {
        "gpu": target.gpu.title,
        "phases": {
            name: {
                "launches": target.launches(name),
                "bytes": target.bytes_moved(name),
                "flops": target.flops(name),
                "seconds": target.seconds(name),
                "cuda_graph": all(program.no_graph is None for program in target.of(name)),
            }
            for name in names
        },
        "weight_bytes": target.weight_bytes,
        "activation_bytes": target.activation_bytes,
        "run": {"seconds": run.cached, "least_seconds": run.least, "plain_seconds": run.plain},
    }


def as_page(explanation: Findings, calls: Sequence[SimulatedCall]) -> dict[str, Any]:
    """The estimate as the HTML page shows it."""
    target = _target(explanation)
    reasons = {row[0]: [program.no_graph for program in target.of(row[0])] for row in phase_rows(target)}
    return {
        "title": target.gpu.title,
        "bandwidth": f"{target.gpu.bandwidth / 1e9:.0f}",
        "gap": f"{1e6 * target.gpu.launch_seconds:.0f}",
        "run": str(run_seconds(explanation, calls)),
        "memory": memory_words(explanation),
        "phase_columns": PHASE_COLUMNS,
        "phases": [(row, "; ".join(filter(None, reasons[row[0]]))) for row in phase_rows(target)],
        "kernel_columns": KERNEL_COLUMNS,
        "kernels": [(name, list(map(kernel_row, target.kernels(name)))) for name in ("plain", *target.calls)],
    }
