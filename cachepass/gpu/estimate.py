"""Estimate: every program of a model for a GPU, and what a call in each phase costs on it.

estimate : Gpu, Program, the plain graph -> GpuEstimate
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .. import _torch
from .._torch.machine_code import MachineCode
from ..program.specialize import Variant
from ..program.trace import Traced
from ..program.variants import Program
from .program import GpuProgram, Launch, compile_for
from .table import Gpu


@dataclass(frozen=True)
class Kernels:
    """Launches of one kernel, or of one operation at the same sizes, in a program.

    Attributes:
        launch: The first of them.
        count: How many there are.
        seconds: The estimate for all of them, without gaps.
        code: Its machine code, if it is a kernel of Inductor's.
    """

    launch: Launch
    count: int
    seconds: float
    code: MachineCode | None


@dataclass(frozen=True)
class GpuEstimate:
    """What a model with a cache would be on a GPU: compiled for it, never run. Times are estimates, no measurements.

    Attributes:
        gpu: The GPU.
        programs: By name: ``"plain"`` (the model without caching, as Inductor compiles it), one for each phase,
            ``"decide"`` (up to the decision, where the data decide), ``"once"`` (what is computed once per run); those
            of other routes behind the route's name, as ``"half/once"``.
        calls: For each phase the programs that a call in it runs.
        weight_bytes: Bytes of the model's parameters and buffers.
    """

    gpu: Gpu
    programs: dict[str, GpuProgram]
    calls: dict[str, tuple[str, ...]] = field(repr=False)
    weight_bytes: int

    @property
    def plain(self) -> GpuProgram:
        return self.programs["plain"]

    def of(self, phase: str) -> tuple[GpuProgram, ...]:
        """The programs that a call in a phase runs, ``"plain"`` and ``"once"`` included."""
        return tuple(self.programs[name] for name in self.calls.get(phase, (phase,)))

    def seconds(self, phase: str) -> float:
        """Estimated time of a call in a phase."""
        return sum(program.seconds for program in self.of(phase))

    def launches(self, phase: str) -> int:
        """Kernels and operations that a call in a phase starts."""
        return sum(len(program.launches) for program in self.of(phase))

    def bytes_moved(self, phase: str) -> int:
        """Bytes that a call in a phase reads and writes."""
        return sum(program.bytes_moved for program in self.of(phase))

    def flops(self, phase: str) -> int:
        """FLOPs of the matrix products, convolutions and attentions of a call in a phase."""
        return sum(program.flops for program in self.of(phase))

    @property
    def activation_bytes(self) -> int:
        """The most that any of the programs with a cache has allocated at a time."""
        return max(program.activation_bytes for name, program in self.programs.items() if name != "plain")

    def kernels(self, phase: str) -> tuple[Kernels, ...]:
        """What a call in a phase launches, those that take longest first."""
        grouped: dict[tuple[object, ...], list[Launch]] = {}
        codes: dict[str, MachineCode] = {}
        for program in self.of(phase):
            codes |= program.kernels
            for launch in program.launches:
                key = launch.name, launch.shapes, launch.bytes_moved
                grouped.setdefault(key, []).append(launch)
        rows = [
            Kernels(found[0], len(found), sum(launch.seconds(self.gpu) for launch in found), codes.get(found[0].name))
            for found in grouped.values()
        ]
        return tuple(sorted(rows, key=lambda row: -row.seconds))


def estimate(gpu: Gpu, program: Program, plain: Traced) -> GpuEstimate:
    """Compile all programs for a GPU. ``plain``: the model's graph without caching."""
    codes: dict[str, MachineCode] = {}
    programs: dict[str, GpuProgram] = {}
    calls: dict[str, tuple[str, ...]] = {}
    for phase, variant, traced in (("", Variant("plain", plain.gm, ()), plain), *program.all_variants()):
        if variant.name not in programs:
            programs[variant.name] = compile_for(
                gpu, variant, traced.inputs, traced.context,
                shares=program.shares, machine_code=codes,
            )  # fmt: skip
        if phase:
            calls[phase] = (*calls.get(phase, ()), variant.name)
    return GpuEstimate(gpu, programs, calls, _weight_bytes(plain))


def _weight_bytes(traced: Traced) -> int:
    """Of the model's own tensors; memory that several of them share counts once."""
    weights = {_torch.storage_of(traced.inputs[i]): traced.inputs[i] for i in traced.parameters}
    return sum(_torch.hint(weight.untyped_storage().nbytes()) for weight in weights.values())
