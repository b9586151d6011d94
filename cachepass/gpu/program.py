"""A program for a GPU: compiled without it, and played with tensors that have no memory, to see what it launches.

    compile_for : Variant, its inputs, Gpu -> GpuProgram

Inductor writes its code as on a machine that has the GPU, and Triton makes machine code of the kernels. Playing it
tells every launch with what it reads and writes, and what is allocated when. Nothing is measured; block sizes are the
first of those among which Inductor would choose by measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .. import _torch
from .._torch import offline, playing
from .._torch.machine_code import MachineCode, assemble
from .._torch.offline import Kernel, Site, Written
from ..capture.regions import dotted
from ..program.lower import Ready, make_ready
from ..program.share import Shared
from ..program.specialize import Variant
from .retarget import CUDA, retarget
from .table import Gpu


@dataclass(frozen=True)
class Launch:
    """A kernel of Inductor's, or an operation of torch's, that a program starts.

    Attributes:
        name: Of the kernel, or of the operation (``aten.addmm``).
        module: Path of the module that it computes a part of; in a block that is compiled once for all, the first's.
        bytes_read, bytes_written: Of memory; every element once.
        flops: Of matrix products, convolutions and attention, by formula; 0 for all else, which memory bounds.
        dtype: Of what it multiplies, which decides on the peak rate.
        shapes: Of an operation's arguments.
        fused: It is a kernel that Inductor wrote.
    """

    name: str
    module: str
    bytes_read: int
    bytes_written: int
    flops: int = 0
    dtype: torch.dtype | None = None
    shapes: tuple[tuple[int, ...], ...] = ()
    fused: bool = False

    @property
    def bytes_moved(self) -> int:
        return self.bytes_read + self.bytes_written

    def seconds(self, gpu: Gpu) -> float:
        """The roofline: moving its bytes at full bandwidth, or its FLOPs at the peak rate, whichever takes longer."""
        return max(self.bytes_moved / gpu.bandwidth, self.flops / gpu.peak(self.dtype) if self.flops else 0.0)


def seconds_of(launches: Sequence[Launch], gpu: Gpu) -> float:
    """The estimate of launches: the roofline of each, and the gaps between them."""
    return sum(launch.seconds(gpu) for launch in launches) + gpu.launch_seconds * len(launches)


@dataclass(frozen=True)
class GpuProgram:
    """A program compiled for a GPU.

    Attributes:
        name: Of the variant.
        gpu: The GPU.
        launches: In the order of the program.
        kernels: Machine code by name.
        activation_bytes: The most that is allocated at a time, results included, but what slots take over, which give
            back as much before.
        no_graph: Why CUDA graphs cannot run it, in Inductor's words; None: they can.
        shared: What it calls several times.
        written: The code.
    """

    name: str
    gpu: Gpu
    launches: tuple[Launch, ...]
    kernels: dict[str, MachineCode] = field(repr=False)
    activation_bytes: int
    no_graph: str | None
    shared: tuple[Shared, ...]
    written: Written = field(repr=False)

    @property
    def seconds(self) -> float:
        """The estimate: the roofline of each launch, and the gaps between them."""
        return seconds_of(self.launches, self.gpu)

    @property
    def bytes_moved(self) -> int:
        return sum(launch.bytes_moved for launch in self.launches)

    @property
    def flops(self) -> int:
        return sum(launch.flops for launch in self.launches)


@dataclass(frozen=True, eq=False)
class Compiled:
    """A program as Inductor wrote it for a GPU, and (fake) inputs for it."""

    written: Written
    inputs: tuple[Any, ...]
    context: _torch.SavedContext
    ready: Ready
    no_graph: str | None


def write_for(
    variant: Variant,
    own_inputs: Sequence[Any],
    context: _torch.SavedContext,
    *,
    shares: bool,
) -> Compiled:
    """Inductor's code for a variant, on the GPU that torch is ``pretending`` to have."""
    moved, inputs, target = retarget(variant, own_inputs, context)
    ready = make_ready(moved, inputs, shares=shares, adopts=not context.cudagraphs)
    with offline.recording() as made:
        compiled = ready.compile(target, cudagraphs=variant.repeated)
    given = (*ready.inputs, *ready.numbers)
    read = range(len(given)) if ready.read is None else ready.read
    return Compiled(made.programs[-1], tuple(given[i] for i in read), target, ready, offline.no_cudagraph(compiled))


def compile_for(
    gpu: Gpu,
    variant: Variant,
    own_inputs: Sequence[Any],
    context: _torch.SavedContext,
    *,
    shares: bool,
    machine_code: dict[str, MachineCode],
) -> GpuProgram:
    """Compile a variant for a GPU, and see what it launches. ``machine_code``: of kernels by their source, where it is
    kept, for programs have many in common."""
    with offline.pretending(gpu.title, gpu.properties):
        made = write_for(variant, own_inputs, context, shares=shares)
        watching = Watching()
        with made.context.fake_mode:
            playing.play(made.written, made.inputs, watching, CUDA)
        kernels = {name: _machine_code(kernel, machine_code) for name, kernel in made.written.kernels.items()}
    return GpuProgram(
        variant.name,
        gpu,
        tuple(watching.launches),
        kernels,
        max(0, watching.peak - sum(_bytes(made.ready.inputs[i]) for i in made.ready.adopting)),
        made.no_graph,
        made.ready.shared,
        made.written,
    )


def _machine_code(kernel: Kernel, known: dict[str, MachineCode]) -> MachineCode:
    source = kernel.source.replace(kernel.name, "")
    if source not in known:
        known[source] = assemble(kernel)
    return known[source]


# ---- playing ---------------------------------------------------------------------------------------------------------


class Watching:
    """Writes down what a program launches and allocates."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.peak = self._allocated = 0

    def kernel(self, kernel: Kernel, site: Site | None, args: Sequence[Any]) -> None:  # noqa: ARG002
        assert site is not None and site.bytes_read is not None and site.bytes_written is not None, kernel.name
        self.launches.append(Launch(kernel.name, _module(site), site.bytes_read, site.bytes_written, fused=True))

    def operation(self, target: Any, site: Site | None, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
        result = kwargs["out"] if "out" in kwargs else run()
        read, written = playing.touched(target, args, kwargs, result)
        if not written:
            return result
        if "out" not in kwargs:
            for value in written:
                self.allocated(value)
        given = {name: value for name, value in kwargs.items() if name != "out"}
        flops = _torch.flops(target, args, given, result) or 0
        floats = [value.dtype for value in read if value.is_floating_point()]
        self.launches.append(
            Launch(
                str(target.overloadpacket),
                _module(site),
                sum(map(_bytes, read)),
                sum(map(_bytes, written)),
                flops,
                floats[0] if flops and floats else None,
                tuple(tuple(map(_torch.hint, value.shape)) for value in read),
            )
        )
        return result

    def allocated(self, value: torch.Tensor) -> None:
        size = _torch.hint(value.untyped_storage().nbytes())
        self._allocated += size
        self.peak = max(self.peak, self._allocated)

        def free() -> None:
            self._allocated -= size

        playing.when_freed(value, free)


def _bytes(value: torch.Tensor) -> int:
    """Of the elements of a (fake) tensor; those that it has several times count once."""
    sizes = [_torch.hint(size) for size, stride in zip(value.shape, value.stride(), strict=True) if stride != 0]
    total = value.dtype.itemsize
    for size in sizes:
        total *= size
    return total


def _module(site: Site | None) -> str:
    """The module of most of what is computed; of an operation, that of the node itself, which stands first."""
    paths: dict[str, int] = {}
    nodes = () if site is None else site.nodes if site.bytes_read is not None else site.nodes[:1]
    for node in nodes:
        path = module_of(node)
        if path:
            paths[path] = paths.get(path, 0) + 1
    return max(paths, key=lambda path: (paths[path], path.count("."))) if paths else ""


def module_of(node: fx.Node) -> str:
    """Path of the innermost module call of a node."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return dotted(stack[-1][0]) if stack else ""
