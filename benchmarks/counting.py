"""What a model under ``torch.compile`` would launch on a GPU that is not there, whatever breaks its graph.

    counting = Counting(GPUS["h100"])
    compiled = torch.compile(model, backend=counting.backend)
    with counting.step() as launches, torch.no_grad():
        compiled(**inputs)

Each graph that Dynamo captures is compiled for the GPU as programs of a cache are (``cachepass/gpu``), and counts
whenever it is called. What runs between graphs counts as one launch for each operation of ATen. Nothing is computed:
results are memory that nobody has touched, so neither weights nor values take up any.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from cachepass import _torch
from cachepass._torch import playing
from cachepass._torch.machine_code import MachineCode
from cachepass.gpu.program import GpuProgram, Launch, Watching, compile_for
from cachepass.gpu.table import Gpu
from cachepass.program.specialize import Variant


class Counting(TorchDispatchMode):
    """A backend of ``torch.compile`` and, while a step runs, an eye on what is in no graph.

    ``answer`` is what the model's code gets when it asks the GPU for a number, as hooks do to decide.
    """

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.answer = 0.0
        self.graphs = 0  # captured so far, those that are the same included
        self._gpu = gpu
        self._programs: dict[Any, GpuProgram] = {}
        self._codes: dict[str, MachineCode] = {}
        self._fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._watching = Watching()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """torch.compile compiles under this mode, which sees nothing of it."""
        return True

    @contextlib.contextmanager
    def step(self) -> Iterator[list[Launch]]:
        """What is launched in this block."""
        self._watching = Watching()
        with self:
            yield self._watching.launches

    def backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph for the GPU; what it returns only counts."""

        def inner(aten: fx.GraphModule, own_inputs: Sequence[Any], **kwargs: Any) -> Callable[[list[Any]], Any]:
            self.graphs += 1
            program = self._program(aten, own_inputs, kwargs)
            returned = aten.graph.output_node().args[0]
            placeholders = aten.graph.find_nodes(op="placeholder")

            def run(given: list[Any]) -> list[Any]:
                self._watching.launches.extend(program.launches)
                known = dict(zip(placeholders, given, strict=True))
                return [known[node] if node in known else _untouched(node) for node in returned]

            run._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]
            return run

        return _torch.compile_once(gm, inputs, inner, {})

    def _program(self, aten: fx.GraphModule, inputs: Sequence[Any], kwargs: dict[str, Any]) -> GpuProgram:
        """The program of a graph; blocks that are the same have one."""
        key = aten.code, tuple(map(_layout, inputs))
        if key not in self._programs:
            variant = Variant("graph", aten, ())
            context = _torch.save_context(inputs, {}, kwargs)
            self._programs[key] = compile_for(
                self._gpu, variant, inputs, context, shares=True, machine_code=self._codes
            )
        return self._programs[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.answer
        returns_tensors = any("Tensor" in str(value.type) for value in func._schema.returns)
        if playing.is_free(func) or not returns_tensors:
            return func(*args, **kwargs)
        return self._watching.operation(func, None, args, kwargs, lambda: self._made(func, args, kwargs))

    def _made(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation would return: what it writes to, or memory that nobody has touched."""
        _, written = playing.touched(func, args, kwargs, None)
        if written:
            return written[0] if len(written) == 1 else tuple(written)
        with self._fake_mode:
            made = func(*args, **kwargs)
        return pytree.tree_map_only(torch.Tensor, _untouched_like, made)


def _layout(value: Any) -> Any:
    return str((value.shape, value.stride(), value.dtype)) if isinstance(value, torch.Tensor) else str(value)


def _untouched(node: Any) -> Any:
    value = node.meta["val"] if isinstance(node, fx.Node) else node
    return _untouched_like(value) if isinstance(value, torch.Tensor) else value


def _untouched_like(value: torch.Tensor) -> torch.Tensor:
    sizes, strides = (tuple(map(_torch.hint, numbers)) for numbers in (value.shape, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
