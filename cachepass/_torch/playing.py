"""Running a program that Inductor wrote for a GPU, on whatever tensors: fake ones, or those of a CPU.

The program's own Python code runs; what it allocates is allocated where its inputs are, its Triton kernels are given to
a function, and operations of torch are seen on their way.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .inductor import is_view
from .offline import Kernel, Site, Written


class Player(Protocol):
    """What is told while a program runs."""

    def kernel(self, kernel: Kernel, site: Site | None, args: Sequence[Any]) -> None:
        """A Triton kernel is launched."""
        ...

    def operation(self, target: Any, site: Site | None, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
        """An operation of torch, neither a view nor an allocation; its result, which ``run`` makes."""
        ...

    def allocated(self, value: torch.Tensor) -> None:
        """Memory is asked for."""
        ...


def play(program: Written, inputs: Sequence[Any], player: Player, device: torch.device) -> Any:
    """Call a program with its inputs; its results. To be called while ``pretending``; ``device``: where it allocates.

    Nothing of it is done on a GPU.
    """
    with _namespace(program, player, device) as namespace, _Seen(program, player, device), torch.no_grad():
        return namespace["call"](list(inputs))


class _Launcher:
    """Stands for a kernel in the program."""

    def __init__(self, kernel: Kernel, program: Written, player: Player) -> None:
        self._kernel, self._program, self._player = kernel, program, player

    def run(self, *args: Any, stream: Any = None) -> None:  # noqa: ARG002
        self._player.kernel(self._kernel, self._program.site_at(sys._getframe(1)), args)


@contextlib.contextmanager
def _namespace(program: Written, player: Player, device: torch.device) -> Iterator[dict[str, Any]]:
    """The program's names, with ours for those that touch a GPU or the memory of tensors."""

    def empty(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        value = torch.empty_strided(size, stride, dtype=dtype, device=device)
        player.allocated(value)
        return value

    def reinterpret(value: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int = 0) -> torch.Tensor:
        return torch.as_strided(value, size, stride, value.storage_offset() + offset)

    namespace = program.namespace
    ours: dict[str, Any] = {name: _Launcher(kernel, program, player) for name, kernel in program.kernels.items()}
    ours |= {
        "empty_strided_cuda": empty,
        "reinterpret_tensor": reinterpret,
        "assert_alignment": lambda *_: None,
        "copy_if_misaligned": lambda value: value,
    }
    before = {name: namespace[name] for name in ours if name in namespace}
    namespace.update({name: ours[name] for name in before})
    try:
        yield namespace
    finally:
        namespace.update(before)


class _Seen(TorchDispatchMode):
    """Hands on what the program calls of torch."""

    def __init__(self, program: Written, player: Player, device: torch.device) -> None:
        super().__init__()
        self._program, self._player, self._device = program, player, device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs and kwargs["device"] is not None:
            kwargs["device"] = self._device
        if is_free(func):
            return func(*args, **kwargs)
        site = self._program.site_at(sys._getframe(1))
        return self._player.operation(func, site, args, kwargs, lambda: func(*args, **kwargs))


def is_free(operation: Any) -> bool:
    """An operation that launches nothing: it looks at memory another way, or asks for some."""
    name = operation.overloadpacket.__name__
    return operation.namespace == "prim" or is_view(operation) or name.startswith("empty")


def when_freed(value: torch.Tensor, call: Callable[[], None]) -> None:
    """Call something when the memory of a tensor is given back."""
    weakref.finalize(value.untyped_storage(), call)


def touched(target: Any, args: Any, kwargs: Any, result: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors that an operation reads, and those that it writes. One that makes a value in the shape of another
    reads nothing."""
    schema, name = target._schema, target.overloadpacket.__name__
    given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | dict(kwargs)
    written, read = [], []
    for argument in schema.arguments:
        values = [v for v in pytree.tree_leaves(given.get(argument.name)) if isinstance(v, torch.Tensor)]
        (written if argument.is_write else read).extend(values)
    if name.endswith("_like") or name.startswith("new_"):
        read = []
    if not written:
        written = [value for value in pytree.tree_leaves(result) if isinstance(value, torch.Tensor)]
    return read, written
