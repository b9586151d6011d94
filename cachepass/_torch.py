"""The only door to private torch APIs: one function per need, each present in torch 2.11, 2.13 and 2.15 or guarded.

Nothing here knows what caching is. Whatever a new torch release renames is renamed in this file and nowhere else.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import fx
from torch._dynamo import convert_frame, eval_frame
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.exc import ShortenTraceback, TensorifyScalarRestartAnalysis
from torch._dynamo.pgo import FrameStateSizeEntry, auto_dynamic, process_automatic_dynamic
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics
from torch._functorch import config as functorch_config
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._higher_order_ops.cond import cond_op
from torch._inductor import config as inductor_config
from torch._inductor import inductor_prims, list_mode_options
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V
from torch._logging import trace_structured
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

COND = cond_op
FORCE_STRIDES = inductor_prims.force_stride_order

__all__ = [
    "COND",
    "FORCE_STRIDES",
    "Frame",
    "ModuleCall",
    "SavedContext",
    "calling_module",
    "calling_modules",
    "capture",
    "compile_once",
    "compile_statistics",
    "current_frame",
    "dump_graph",
    "fake_mode_of",
    "flatten",
    "inductor_keys",
    "inductor_modes",
    "input_index",
    "is_resumed",
    "is_symbolic",
    "module_of",
    "placeholder_source",
    "plain_inductor",
    "raise_unwrapped",
    "reset_compile_statistics",
    "restart_dynamic",
    "restart_static",
    "root_modules",
    "save_context",
    "stops_at_break",
    "storage_of",
    "trace",
    "trace_only",
    "traced_from",
    "unflatten",
]


# ---- Dynamo ---------------------------------------------------------------------------------------------------------


def raise_unwrapped(error: Exception) -> NoReturn:
    """Raise ``error`` out of a backend so that the caller of the compiled model gets it as its own class.

    Dynamo wraps whatever a backend raises in ``BackendCompilerFailed``, except for its ``ShortenTraceback`` family:
    the error is re-made as a subclass of both its own class and that one.
    """
    bases: Any = (type(error), ShortenTraceback)
    kind: Any = type(type(error).__name__, bases, {"__module__": type(error).__module__})
    unwrapped = kind.__new__(kind, *error.args)
    ShortenTraceback.__init__(unwrapped, *error.args, first_useful_frame=None)
    unwrapped.__dict__.update(error.__dict__)
    raise unwrapped.with_traceback(error.__traceback__) from None


def root_modules() -> list[torch.nn.Module]:
    """The modules among the local variables of the frame that Dynamo is tracing (``self`` first); outside: none."""
    frame = current_frame()
    if frame is None:
        return []
    scope = frame.locals
    names = sorted(scope, key=lambda name: name != "self")
    return [scope[name] for name in names if isinstance(scope[name], torch.nn.Module)]


@dataclass(frozen=True)
class Frame:
    """The call that Dynamo is tracing: its code and its arguments, as they were when it began."""

    code: types.CodeType
    globals: dict[str, Any]
    locals: dict[str, Any]


def current_frame() -> Frame | None:
    """The outermost frame of the graph that a backend was just given; outside of Dynamo: None."""
    try:
        tx: Any = InstructionTranslator.current_tx().output.root_tx
    except AttributeError:
        return None
    return Frame(tx.f_code, tx.f_globals, dict(tx.f_locals))


def stops_at_break(gm: fx.GraphModule) -> bool:
    """A Dynamo graph is only the first part of its frame: the graph breaks behind it."""
    reason: Any = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and reason.graph_break


def is_resumed(frame: Frame) -> bool:
    """A frame is the rest of another one, behind a graph break."""
    return frame.code.co_name.startswith("torch_dynamo_resume_in_")


@dataclass(frozen=True)
class ModuleCall:
    """A call ``module(*args, **kwargs)`` that is on the Python stack."""

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


_CALL = torch.nn.Module._call_impl.__code__


def calling_modules() -> tuple[list[ModuleCall], int | None]:
    """The calls of modules that the current Python frame runs in, innermost first, and which of them is of the module
    that was given to ``torch.compile`` (None: a function was).

    Calls that Dynamo inlined are not on the stack; the wrappers that ``torch.compile(module)`` makes are left out.
    """
    calls: list[ModuleCall] = []
    compiled: list[int | None] = []
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            scope = frame.f_locals
            if not isinstance(scope["self"], OptimizedModule):
                calls.append(ModuleCall(scope["self"], scope["args"], scope["kwargs"]))
        elif not compiled and frame.f_code.co_name == "compile_wrapper" and _is_of(frame, eval_frame):
            compiled.append(len(calls) - 1 if calls else None)
        frame = frame.f_back
    return calls, compiled[0] if compiled else None


def _is_of(frame: types.FrameType, module: types.ModuleType) -> bool:
    return frame.f_globals.get("__name__") == module.__name__


def calling_module() -> torch.nn.Module | None:
    """The module of the innermost such call."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL and not isinstance(module := frame.f_locals["self"], OptimizedModule):
            return module
        frame = frame.f_back
    return None


def traced_from() -> str:
    """From where the frame that Dynamo is tracing was called: ``"module"`` (it is the ``forward`` of the innermost
    calling module), ``"compile"`` (it is what was given to ``torch.compile``) or ``"code"`` (any other code)."""
    frame, caller = sys._getframe(1), None
    while frame is not None:
        if _is_of(frame, convert_frame):
            caller = frame.f_back
        elif caller is not None and not frame.f_globals.get("__name__", "").startswith(("torch.", "contextlib")):
            break  # the compiler's own frames are over
        frame = frame.f_back
    name = "" if caller is None else caller.f_globals.get("__name__", "")
    return {torch.nn.modules.module.__name__: "module", eval_frame.__name__: "compile"}.get(name, "code")


def module_of(key: str) -> int:
    """The id of the module that a key of ``nn_module_stack`` stands for: ``"<id>"``, or ``"<id>@n"`` when called again;
    0, if it is none of these."""
    name = key.split("@")[0]
    return int(name) if name.isdigit() else 0


_captures = itertools.count()


class _Captured(Exception):
    """Ends a captured call before anything runs."""


def capture(frame: Frame, args: Sequence[Any], kwargs: dict[str, Any],
            backend: Callable[[fx.GraphModule, Sequence[Any]], None]) -> None:  # fmt: skip
    """Trace a frame's code on other arguments, as one graph, and hand that to ``backend``; nothing runs.

    The code object is a copy of a name of its own, so what Dynamo keeps per code object (compiled entries) and per name
    (which sizes were seen to change, and are symbolic therefore) stays as it is, and shapes are static.
    """
    closure = tuple(types.CellType(frame.locals[name]) for name in frame.code.co_freevars)
    code = frame.code.replace(co_name=f"{frame.code.co_name}_captured_{next(_captures)}")
    function = types.FunctionType(code, frame.globals, code.co_name, None, closure)
    if not trace_only(function, args, kwargs, backend, dynamic=False):
        raise RuntimeError("the frame ran without a graph")


def trace_only(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any],
               backend: Callable[[fx.GraphModule, Sequence[Any]], None], *,
               dynamic: bool | None = None) -> bool:  # fmt: skip
    """Hand the one graph of a call to ``backend``, whose ValueErrors reach the caller as they are; nothing runs.

    Returns whether there was a graph.
    """
    receiver = [backend]  # emptied afterwards: Dynamo remembers every backend, and this one would keep the graph alive

    def compiler(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            receiver[0](gm, inputs)
        except ValueError as error:
            raise_unwrapped(error)

        def stop(*_: Any) -> Any:
            raise _Captured

        return stop

    try:
        torch.compile(function, backend=compiler, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
    except _Captured:
        return True
    finally:
        receiver.clear()
    return False


def is_symbolic(gm: fx.GraphModule) -> bool:
    """Some input of a Dynamo graph is a symbolic size or has one."""
    values = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
    return any(
        isinstance(value, torch.SymInt)
        or (isinstance(value, torch.Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape))
        for value in values
    )


def restart_static(inputs: Sequence[Any]) -> bool:
    """Let Dynamo trace the frame once more, with static sizes for the tensors among the graph's inputs.

    Does not return if that may help; False if all of them are static already.
    """
    own = [v for v in inputs if isinstance(v, torch.Tensor) and not isinstance(v, torch.nn.Parameter)]
    dynamic = [v for v in own if len(getattr(v, "_dynamo_static_indices", ())) < v.ndim]
    if not dynamic:
        return False
    for value in dynamic:  # what mark_static does; while a backend runs, that one looks at the graph instead
        value._dynamo_static_indices = set(range(value.ndim))  # pyright: ignore[reportAttributeAccessIssue]
    raise TensorifyScalarRestartAnalysis(restart_reason="cachepass: static sizes")


def restart_dynamic(name: str, value: float) -> None:
    """Let Dynamo trace the frame once more, with its argument ``name``, a Python number, as an input of the graph.

    What Dynamo itself does when a number changes from one call to the next, a call earlier. Returns if that was done
    already and the graph has no such input nevertheless.
    """
    tx: Any = InstructionTranslator.current_tx().output.root_tx
    other = FrameStateSizeEntry.make_scalar(value + 1)  # pyright: ignore[reportArgumentType]
    before = FrameStateSizeEntry.make_scalar(value)  # pyright: ignore[reportArgumentType]
    source = f"L[{name!r}]"
    if process_automatic_dynamic(tx, source, before).scalar is auto_dynamic:
        return
    process_automatic_dynamic(tx, source, other)
    raise TensorifyScalarRestartAnalysis(restart_reason=f"cachepass: {name} changes from call to call")


def placeholder_source(node: fx.Node) -> str | None:
    """Where a placeholder of a Dynamo graph comes from, as Dynamo writes it: ``L['self']._parameters['weight']``."""
    source: Any = getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return None
    return source.name


def reset_compile_statistics() -> None:
    """Empty Dynamo's caches and counters."""
    torch._dynamo.reset()
    counters.clear()
    clear_compilation_metrics()


def compile_statistics() -> tuple[int, int, int]:
    """Graphs captured, graph breaks and recompiles since :func:`reset_compile_statistics`."""
    recompiles = sum(metric.recompile_reason is not None for metric in get_compilation_metrics())
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()), recompiles


# ---- AOTAutograd and Inductor ---------------------------------------------------------------------------------------


def inductor_keys() -> set[str]:
    return set(inductor_config.get_config_copy())


def inductor_modes() -> dict[str, dict[str, Any]]:
    """The config patches of every ``mode`` of torch.compile."""
    return dict(list_mode_options())


def plain_inductor(gm: fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any]) -> Callable[..., Any]:
    """Inductor as ``backend="inductor"`` runs it."""
    return compile_fx(gm, inputs, config_patches=patches or None)  # pyright: ignore[reportReturnType]


def compile_once(gm: fx.GraphModule, inputs: Sequence[Any], inner: Callable[..., Any],
                 patches: dict[str, Any]) -> Callable[..., Any]:  # fmt: skip
    """Run AOTAutograd, decompositions and joint passes over ``gm`` and hand the ATen graph to ``inner``.

    AOTAutograd's cache is off: a hit would bypass ``inner``. Inductor's own FX graph cache still serves each variant.
    """
    with functorch_config.patch(enable_autograd_cache=False):
        return compile_fx(gm, inputs, inner_compile=inner, config_patches=patches or None)  # pyright: ignore


@dataclass(frozen=True)
class SavedContext:
    """What compiling a variant later needs of the moment at which the ATen graph was handed over."""

    fake_mode: FakeTensorMode
    tracing_context: TracingContext | None
    patches: dict[str, Any]
    inner_kwargs: dict[str, Any]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.patches:
                stack.enter_context(inductor_config.patch(self.patches))
            stack.enter_context(tracing(self.tracing_context))
            stack.enter_context(V.set_fake_mode(self.fake_mode))
            yield

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
        """``compile_fx_inner`` over a variant; the result takes its inputs as one list (boxed)."""
        with self.entered(), torch.no_grad():
            return compile_fx_inner(gm, inputs, **self.inner_kwargs)  # pyright: ignore[reportReturnType]


def save_context(inputs: Sequence[Any], patches: dict[str, Any], inner_kwargs: dict[str, Any]) -> SavedContext:
    return SavedContext(fake_mode_of(inputs), TracingContext.try_get(), dict(patches), dict(inner_kwargs))


def fake_mode_of(inputs: Sequence[Any]) -> FakeTensorMode:
    return detect_fake_mode(inputs) or FakeTensorMode(allow_non_fake_inputs=True)


def input_index(placeholder: fx.Node) -> int | None:
    """Which input of the Dynamo graph an ATen placeholder is, from AOTAutograd's own description of it."""
    return getattr(placeholder.meta.get("desc"), "idx", None)


def storage_of(value: torch.Tensor) -> int:
    """An identity of the memory behind a (fake) tensor: equal for aliases."""
    return value.untyped_storage()._cdata


# ---- tracing --------------------------------------------------------------------------------------------------------


def flatten(value: Any) -> tuple[list[Any], Any]:
    """Leaves and structure of nested lists, tuples and dicts."""
    return pytree.tree_flatten(value)


def unflatten(leaves: Sequence[Any], spec: Any) -> Any:
    return pytree.tree_unflatten(leaves, spec)


def trace(function: Callable[..., Any], leaves: Sequence[torch.Tensor], spec: Any) -> tuple[fx.GraphModule, Any]:
    """A torch function as an ATen graph, decomposed as Inductor wants it; the structure of its result.

    ``leaves`` and ``spec`` are the flattened arguments; the graph takes and returns flat lists.
    """
    results: list[Any] = []

    def flat(*inputs: torch.Tensor) -> list[Any]:
        outputs, result = pytree.tree_flatten(function(*pytree.tree_unflatten(inputs, spec)))
        results.append(result)
        return outputs

    return make_fx(flat, decomposition_table=select_decomp_table())(*leaves), results[-1]


def dump_graph(name: str, text: Callable[[], str]) -> None:
    """Give a graph to tlparse (``TORCH_TRACE``); free when nobody listens."""
    trace_structured(
        "artifact", metadata_fn=lambda: {"name": f"cachepass_{name}", "encoding": "string"}, payload_fn=text
    )
