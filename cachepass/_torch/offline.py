"""Inductor and Triton for a GPU that is not there: the code that they would make, and the machine code of kernels.

Both need a GPU only to run what they made. While ``pretending``, torch says that there is one, with the properties
given; ``recording`` keeps what Inductor writes, and starts no compiler.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import fx
from torch._dynamo import device_interface
from torch._guards import TracingContext
from torch._inductor import scheduler as inductor_scheduler
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CacheBase, PyCodeCache
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.cudagraph_utils import BoxedDeviceIndex
from torch._inductor.dependencies import MemoryDep, StarDep
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.utils import BoxedBool
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensor, FakeTensorMode, fake_tensor

from .inductor import SavedContext

_LOCK = threading.RLock()
_SITE = "# cachepass site "
_QUIET = {
    "compile_threads": 1,
    "force_disable_caches": True,
    "max_autotune": False,
    "max_autotune_gemm": False,
    "graph_partition": False,
    "triton.cudagraphs": True,
}


# ---- pretending ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def pretending(name: str, properties: Mapping[str, Any]) -> Iterator[None]:
    """torch has one CUDA device of these ``properties`` (those of ``torch.cuda.get_device_properties``), in the whole
    process: nothing may run on a GPU meanwhile, and one thread at a time is let in."""
    device = SimpleNamespace(name=name, **properties)
    with _LOCK, contextlib.ExitStack() as stack:
        for owner, attributes in _told(device).items():
            for attribute, value in attributes.items():
                stack.enter_context(_replaced(owner, attribute, value))
        stack.enter_context(_triton_driver(device.major * 10 + device.minor))
        stack.enter_context(_own_caches())
        yield


def _told(device: SimpleNamespace) -> dict[Any, dict[str, Any]]:
    """What of torch says that there is a GPU, and which."""
    from torch._inductor.runtime import triton_helpers

    def one(*_: Any) -> Any:
        return device

    def zero(*_: Any) -> int:
        return 0

    def nothing(*_: Any) -> None:
        return None

    cuda = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: False,
        "current_device": zero,
        "device_count": lambda: 1,
        "get_device_properties": one,
        "_get_device_properties": one,
        "get_device_capability": lambda *_: (device.major, device.minor),
        "get_device_name": lambda *_: device.name,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": nothing,
        "set_device": nothing,
        "synchronize": nothing,
        "_lazy_init": nothing,
        "_exchange_device": zero,
        "_maybe_exchange_device": zero,
    }
    interface = {
        "current_device": staticmethod(zero),
        "device_count": staticmethod(lambda: 1),
        "get_device_properties": staticmethod(one),
    }
    worker = {name: interface[name] for name in ("current_device", "get_device_properties")}
    return {
        torch.cuda: cuda,
        torch._C: {"_cuda_getCurrentRawStream": zero, "_cuda_cudaCachingAllocator_is_enabled": lambda: True},
        device_interface.CudaInterface: interface,
        device_interface.CudaInterface.Worker: worker,
        triton_helpers: {"set_driver_to_gpu": nothing},
        torch.Tensor: {"copy_": _copy},
        fake_tensor: {"init_gpu_context": nothing},  # fake tensors wake the device up, where torch was built for it
    }


def _copy(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """``Tensor.copy_``, whose binding wakes the device up first, also for fake tensors."""
    if isinstance(self, FakeTensor):
        return torch.ops.aten.copy_.default(self, source, non_blocking)
    return torch._C.TensorBase.copy_(self, source, non_blocking)


_MISSING = object()


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextlib.contextmanager
def _triton_driver(capability: int) -> Iterator[None]:
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        """As much of a driver as compiling asks for."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

    with _replaced(triton.runtime.driver, "_active", Driver()):
        yield


@contextlib.contextmanager
def _own_caches() -> Iterator[None]:
    """What torch remembers of devices is forgotten on the way in and out."""
    names = ("torch.utils._triton", "torch._inductor.utils", "torch._inductor.codegen.triton")
    holders = [vars(sys.modules[name]) for name in names] + [vars(DeviceProperties), vars(CacheBase)]
    values = [value for holder in holders for value in list(holder.values())]
    values = [value.__func__ if isinstance(value, (classmethod, staticmethod)) else value for value in values]
    caches = [value for value in values if isinstance(value, functools._lru_cache_wrapper)]
    for cache in caches:
        cache.cache_clear()
    try:
        yield
    finally:
        for cache in caches:
            cache.cache_clear()


def another_fake_mode(mode: FakeTensorMode) -> FakeTensorMode:
    """A fake mode with the same symbolic sizes."""
    return FakeTensorMode(shape_env=mode.shape_env, allow_non_fake_inputs=True)


def offline_context(fake_mode: FakeTensorMode, patches: Mapping[str, Any]) -> SavedContext:
    """To compile a graph whose values are of ``fake_mode``: with these options of Inductor's, as far as they need no
    GPU to try kernels on."""
    # CUDA graphs are asked for, to hear whether they could run the program; nothing of it runs.
    kwargs = {
        "is_inference": True,
        "cudagraphs": BoxedBool(True),
        "boxed_forward_device_index": BoxedDeviceIndex(None),
        "static_input_idxs": (),
    }
    return SavedContext(fake_mode, TracingContext(fake_mode), {**patches, **_QUIET}, kwargs)


def no_cudagraph(compiled: Any) -> str | None:
    """Why CUDA graphs cannot run a compiled program, in Inductor's words; None: they can."""
    reason = getattr(compiled, "disabled_cudagraphs_reason", None)
    if reason is not None:
        return str(reason)
    told = getattr(compiled, "cudagraph_info", None)
    return None if told is None or not told.cudagraph_fail_reasons else "; ".join(told.cudagraph_fail_reasons)


# ---- recording -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Kernel:
    """A Triton kernel as Inductor wrote it."""

    name: str
    source: str


@dataclass(frozen=True)
class Site:
    """A place in a program where a kernel or an operation is called.

    Attributes:
        nodes: The nodes of the graph that it computes.
        bytes_read: Of a Triton kernel, what it reads of memory; None of an operation, which its arguments tell.
        bytes_written: What it writes.
    """

    nodes: tuple[fx.Node, ...]
    bytes_read: int | None
    bytes_written: int | None


@dataclass(frozen=True, eq=False)
class Written:
    """A program that Inductor wrote.

    Attributes:
        code: Its Python code.
        path: The file of it.
        namespace: Its names: ``call`` (or a ``runner`` that has it), kernels and functions that it calls.
        sites: All of its places where something is called.
        lines: For each place the line before it.
    """

    code: str
    path: str
    namespace: dict[str, Any]
    sites: tuple[Site, ...]
    lines: tuple[tuple[int, int], ...]

    @property
    def kernels(self) -> dict[str, Kernel]:
        """Triton kernels by name."""
        return {name: value for name, value in self.namespace.items() if isinstance(value, Kernel)}

    def site_at(self, frame: FrameType | None) -> Site | None:
        """Where a call comes from, ``frame`` being that of what it calls."""
        while frame is not None and frame.f_code.co_filename != self.path:
            frame = frame.f_back
        if frame is None:
            return None
        before = [index for line, index in self.lines if line <= frame.f_lineno]
        return self.sites[before[-1]] if before else None


@dataclass(eq=False)
class Recording:
    """What Inductor wrote within ``recording``."""

    programs: list[Written] = field(default_factory=list)
    _sites: list[Site] = field(default_factory=list)

    def mark(self, site: Site) -> None:
        V.graph.wrapper_code.writeline(f"{_SITE}{len(self._sites)}")
        self._sites.append(site)

    def loaded(self, module: ModuleType) -> None:
        path = str(module.__file__)
        code = Path(path).read_text(encoding="utf-8")
        marks = [(n, re.match(rf"\s*{_SITE}(\d+)", line)) for n, line in enumerate(code.splitlines(), 1)]
        found = [(n, int(mark[1])) for n, mark in marks if mark is not None]
        self.programs.append(Written(code, path, vars(module), tuple(self._sites), tuple(found)))


@contextlib.contextmanager
def recording() -> Iterator[Recording]:
    """Programs that Inductor writes in this block are kept, and their kernels not compiled."""
    made = Recording()
    define, load, extern = (
        TritonScheduling.define_kernel,
        PyCodeCache.load_by_key_path.__func__,  # pyright: ignore[reportFunctionMemberAccess]
        inductor_scheduler.Scheduler.codegen_extern_call,
    )

    def define_kernel(self: Any, source: str, schedule: Sequence[Any], kernel: Any) -> str:
        name = define(self, source, schedule, kernel)
        made.mark(_triton_site(schedule, kernel))
        return name

    def codegen_extern_call(self: Any, node: Any) -> None:
        made.mark(Site(_origins([node]), None, None))
        extern(self, node)

    def load_by_key_path(cls: type, *args: Any, **kwargs: Any) -> ModuleType:
        module = load(cls, *args, **kwargs)
        if "call" in vars(module) or "runner" in vars(module):
            made.loaded(module)
        return module

    def triton(_: AsyncCompile, kernel_name: str, source_code: str, device_str: str = "cuda") -> Kernel:  # noqa: ARG001
        return Kernel(kernel_name, source_code)

    with (
        _replaced(TritonScheduling, "define_kernel", define_kernel),
        _replaced(PyCodeCache, "load_by_key_path", classmethod(load_by_key_path)),
        _replaced(inductor_scheduler.Scheduler, "codegen_extern_call", codegen_extern_call),
        _replaced(AsyncCompile, "triton", triton),
    ):
        yield made


def _origins(schedule: Sequence[Any]) -> tuple[fx.Node, ...]:
    """The graph's nodes that scheduled nodes compute; what is computed outside of the graph at hand is none of them."""
    found: dict[fx.Node, None] = {}
    graph = V.graph.module.graph
    for scheduled in schedule:
        for part in scheduled.get_nodes() if hasattr(scheduled, "get_nodes") else ():
            if part.node is not None:
                found.update(dict.fromkeys(node for node in part.node.get_origins() if node.graph is graph))
    return tuple(found)


def _triton_site(schedule: Sequence[Any], kernel: Any) -> Site:
    """What a kernel reads and writes: of each buffer every element that it touches, once."""
    written_here: set[str] = set()
    read: dict[str, dict[Any, int]] = {}
    written: dict[str, dict[Any, int]] = {}
    for scheduled in schedule:
        if not hasattr(scheduled, "read_writes"):  # a mark where a reduction begins or ends
            continue
        for dep in scheduled.read_writes.reads:  # others say what must come first, such as the write of a slot
            is_read = isinstance(dep, MemoryDep) and dep.name not in written_here
            if is_read and dep.name not in kernel.removed_buffers:
                read.setdefault(dep.name, {})[dep.index] = dep.numbytes_hint()
        for dep in scheduled.read_writes.writes:
            written_here.add(dep.name)
            if dep.name not in kernel.removed_buffers and dep.name not in V.graph.removed_buffers:
                written.setdefault(dep.name, {})[getattr(dep, "index", None)] = dep.numbytes_hint()
    return Site(_origins(schedule), _sum(read), _sum(written))


def _sum(touched: Mapping[str, Mapping[Any, int]]) -> int:
    return sum(min(sum(parts.values()), StarDep(name).numbytes_hint()) for name, parts in touched.items())
