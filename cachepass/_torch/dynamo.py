"""Dynamo: the frame being traced, capturing others, restarts, the sources of a graph's inputs, counters."""

from __future__ import annotations

import contextlib
import itertools
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import fx
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import ShortenTraceback, TensorifyScalarRestartAnalysis
from torch._dynamo.pgo import FrameStateSizeEntry, auto_dynamic, process_automatic_dynamic
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics, get_metrics_context


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


def module_of(key: str) -> int:
    """The id of the module that a key of ``nn_module_stack`` stands for: ``"<id>"``, or ``"<id>@n"`` when called
    again; 0, if it is none of these."""
    name = key.split("@")[0]
    return int(name) if name.isdigit() else 0


_captures = itertools.count()


class _Captured(Exception):
    """Ends a captured call before anything runs."""


def capture(
    frame: Frame,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    backend: Callable[[fx.GraphModule, Sequence[Any]], None],
    *,
    numbers: bool = False,
) -> None:
    """Trace a frame's code on other arguments, as one graph, and hand that to ``backend``; nothing runs.

    The code object is a copy of a name of its own, so what Dynamo keeps per code object (compiled entries) and per name
    (which sizes were seen to change, and are symbolic therefore) stays as it is, and shapes are static. With
    ``numbers``, the backend may ask for Python numbers to be inputs (:func:`restart_dynamic`).
    """
    closure = tuple(types.CellType(frame.locals[name]) for name in frame.code.co_freevars)
    code = frame.code.replace(co_name=f"{frame.code.co_name}_captured_{next(_captures)}")
    function = types.FunctionType(code, frame.globals, code.co_name, None, closure)
    if not trace_only(function, args, kwargs, backend, dynamic=None if numbers else False):
        raise RuntimeError("the frame ran without a graph")


def trace_only(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    backend: Callable[[fx.GraphModule, Sequence[Any]], None],
    *,
    dynamic: bool | None = None,
) -> bool:
    """Hand the one graph of a call to ``backend``, whose ValueErrors reach the caller as they are; nothing runs.

    Returns whether there was a graph.
    """

    def stop(*_: Any) -> Any:
        raise _Captured

    def ending(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        backend(gm, inputs)
        return stop

    with _handing_to(ending) as compiler:
        try:
            torch.compile(function, backend=compiler, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
        except _Captured:
            return True
    return False


Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


@contextlib.contextmanager
def _handing_to(backend: Backend) -> Iterator[Backend]:
    """A backend that hands graphs to another one while this block runs, and lets its ValueErrors reach the caller as
    they are. Dynamo remembers every backend, and the other one would keep its graphs alive."""
    receiver = [backend]

    def compiler(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            return receiver[0](gm, inputs)
        except ValueError as error:
            raise_unwrapped(error)

    try:
        yield compiler
    finally:
        receiver.clear()


def call_traced(model: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any], backend: Backend) -> Any:
    """What a model returns in a call whose one graph is replaced by what ``backend`` makes of it, with sizes that are
    constants of it. ValueErrors of the backend reach the caller as they are.

    Dynamo keeps what it traces by the code: that of the model's ``forward`` is copied, so nothing it knows is touched.
    """
    function = fresh_code(model, f"cachepass_export_{next(_captures)}")
    with _handing_to(backend) as compiler:
        return torch.compile(function, backend=compiler, fullgraph=True, dynamic=None)(*args, **kwargs)


@contextlib.contextmanager
def parts_traced(
    parts: Iterable[torch.nn.Module],
    backend: Backend,
    note: Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any], Any], None],
) -> Iterator[None]:
    """Modules are compiled one by one in this block, each as one graph, with what ``backend`` makes of it. ``note`` is
    told of every call of one of them: the module, its arguments, and what it returned."""
    before: dict[Any, Any] = {part: part._compiled_call_impl for part in parts}

    def noted(part: torch.nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            returned = compiled(*args, **kwargs)
            note(part, args, kwargs, returned)
            return returned

        return call

    try:
        with _handing_to(backend) as compiler:
            for part in before:
                part.compile(backend=compiler, fullgraph=True, dynamic=False)
                part._compiled_call_impl = noted(part, part._compiled_call_impl)
            yield
    finally:
        for part, own in before.items():
            part._compiled_call_impl = own


def fresh_code(model: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same function over a code object of its own: Dynamo's caches are per code object, so none is touched."""
    method = model.forward if isinstance(model, torch.nn.Module) else model
    function = getattr(method, "__func__", method)
    if not isinstance(function, types.FunctionType):
        return lambda *args, **kwargs: model(*args, **kwargs)
    fresh = types.FunctionType(
        function.__code__.replace(co_name=name),
        function.__globals__,
        name,
        function.__defaults__,
        function.__closure__,
    )
    fresh.__kwdefaults__ = function.__kwdefaults__
    owner = getattr(method, "__self__", None)
    return fresh if owner is None else types.MethodType(fresh, owner)


def is_symbolic(gm: fx.GraphModule) -> bool:
    """Some input of a Dynamo graph has a symbolic size."""
    values = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return any(isinstance(size, torch.SymInt) for value in tensors for size in value.shape)


_marked: list[tuple[Any, set[int] | None]] = []  # tensors of the user, and what they had


def _unmark(*_: object) -> None:
    """The compilation that marks were made for is over, well or not: the user's tensors are as they were."""
    while _marked:
        value, before = _marked.pop()
        if before is None:
            del value._dynamo_static_indices
        else:
            value._dynamo_static_indices = before


def restart_static(inputs: Sequence[Any]) -> bool:
    """Let Dynamo trace the frame once more, with static sizes for the tensors among the graph's inputs.

    Does not return if that may help; False if all of them are static already.
    """
    own = [v for v in inputs if isinstance(v, torch.Tensor) and not isinstance(v, torch.nn.Parameter)]
    dynamic = [v for v in own if len(getattr(v, "_dynamo_static_indices", ())) < v.ndim]
    if not dynamic:
        return False
    if _unmark not in callback_handler.end_callbacks:  # a reset of Dynamo empties them
        callback_handler.register_end_callback(_unmark)
    for value in dynamic:  # what mark_static does; while a backend runs, that one looks at the graph instead
        _marked.append((value, getattr(value, "_dynamo_static_indices", None)))
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


def capture_seconds(start: float) -> float:
    """Seconds since Dynamo began with the frame that a backend is given, or (where it does not tell) since ``start``, a
    ``time.time()``."""
    began = getattr(get_metrics_context(), "_start_time_ns", None)
    return time.time() - (start if began is None else began / 1e9)


def compile_statistics() -> tuple[int, int, int]:
    """Graphs captured, graph breaks and recompiles since :func:`reset_compile_statistics`."""
    recompiles = sum(metric.recompile_reason is not None for metric in get_compilation_metrics())
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()), recompiles
