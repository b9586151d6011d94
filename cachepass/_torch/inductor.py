"""AOTAutograd and Inductor: one ATen graph, programs of it, functions traced into it."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch._C._functorch import (  # pyright: ignore
    _is_vmap_fallback_enabled,  # pyright: ignore
    _set_vmap_fallback_enabled,  # pyright: ignore
    get_unwrapped,
    is_batchedtensor,
)
from torch._functorch import config as functorch_config
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._higher_order_ops.cond import cond_op
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._inductor import config as inductor_config
from torch._inductor import inductor_prims, list_mode_options
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime.runtime_utils import cache_dir
from torch._inductor.virtualized import V
from torch._logging import trace_structured
from torch._subclasses import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.proxy import GraphAppendingTracer
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

COND = cond_op
INVOKE_SUBGRAPH = invoke_subgraph
FORCE_STRIDES = inductor_prims.force_stride_order


def inductor_keys() -> set[str]:
    return set(inductor_config.get_config_copy())


def inductor_modes() -> dict[str, dict[str, Any]]:
    """The config patches of every ``mode`` of torch.compile."""
    return dict(list_mode_options())


def has_triton() -> bool:
    """Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def cache_folder() -> str:
    """Where Inductor keeps what it compiled; it is made if need be."""
    return cache_dir()


def plain_inductor(gm: fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any]) -> Callable[..., Any]:
    """Inductor as ``backend="inductor"`` runs it."""
    return compile_fx(gm, inputs, config_patches=patches or None)  # pyright: ignore[reportReturnType]


def compile_once(
    gm: fx.GraphModule, inputs: Sequence[Any], inner: Callable[..., Any], patches: dict[str, Any]
) -> Callable[..., Any]:
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

    @property
    def cudagraphs(self) -> bool:
        """CUDA graphs were asked for."""
        return bool(self.inner_kwargs.get("cudagraphs"))

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.patches:
                stack.enter_context(inductor_config.patch(self.patches))
            stack.enter_context(tracing(self.tracing_context))
            stack.enter_context(V.set_fake_mode(self.fake_mode))
            yield

    def compile(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        static: Sequence[int] = (),
        *,
        read: Sequence[int] | None = None,
        cudagraphs: bool = True,
    ) -> Callable[[list[Any]], Any]:
        """``compile_fx_inner`` over a variant; the result takes its inputs as one list (boxed).

        ``static`` are indices of inputs whose memory stays where it is; ``read`` of those that the graph has, None: all
        of them. ``cudagraphs=False``: none for this program, also where the options ask for them.
        """
        kwargs = dict(self.inner_kwargs)
        read = range(len(inputs)) if read is None else read
        position = {index: i for i, index in enumerate(read)}
        unmoved = (*kwargs.get("static_input_idxs", ()), *static)
        kwargs["static_input_idxs"] = tuple(position[index] for index in unmoved if index in position)
        inputs = [inputs[index] for index in read]
        asked = kwargs.get("cudagraphs")
        if asked is not None:  # a box, which Inductor clears where a graph cannot have them: each program has its own
            kwargs["cudagraphs"] = type(asked)(bool(asked) and cudagraphs)
        with self.entered(), torch.no_grad():
            return compile_fx_inner(gm, inputs, **kwargs)  # pyright: ignore[reportReturnType]


@contextlib.contextmanager
def kernels_side_by_side() -> Iterator[None]:
    """Programs compiled in this block by this thread are returned while Inductor's workers still compile their kernels;
    when it ends, all are there. None of them may run in it."""
    wait, owner, waiting = AsyncCompile.wait, threading.get_ident(), []

    def later(self: AsyncCompile, scope: dict[str, Any]) -> None:
        if threading.get_ident() == owner:
            waiting.append((self, scope))
        else:
            wait(self, scope)

    AsyncCompile.wait = later
    try:
        yield
    finally:
        AsyncCompile.wait = wait
        for compiler, scope in waiting:
            wait(compiler, scope)


def graph_module(owner: torch.nn.Module | dict[str, Any], graph: fx.Graph) -> fx.GraphModule:
    """A graph with the owner's attributes, or those of a dict; its Python code is written when it is first called, if
    ever."""
    return _LazyGraphModule(owner, graph)


def save_context(inputs: Sequence[Any], patches: dict[str, Any], inner_kwargs: dict[str, Any]) -> SavedContext:
    return SavedContext(fake_mode_of(inputs), TracingContext.try_get(), dict(patches), dict(inner_kwargs))


def fake_mode_of(inputs: Sequence[Any]) -> FakeTensorMode:
    return detect_fake_mode(inputs) or FakeTensorMode(allow_non_fake_inputs=True)


def input_index(placeholder: fx.Node) -> int | None:
    """Which input of the Dynamo graph an ATen placeholder is, from AOTAutograd's own description of it."""
    return getattr(placeholder.meta.get("desc"), "idx", None)


def depends_on_data(value: object) -> bool:
    """A value is a (fake) tensor with a size that only running the graph can tell."""
    return isinstance(value, torch.Tensor) and bool(free_unbacked_symbols(value))


def data_symbols(value: torch.Tensor | torch.SymInt) -> set[sympy.Symbol]:
    """The numbers in a symbolic number, or in the sizes of a (fake) tensor, that only running the graph can tell."""
    return set(free_unbacked_symbols(value))


def number_of(symbol: sympy.Symbol, size: torch.SymInt) -> torch.SymInt:
    """A number that a size is made of, as a symbolic number by itself."""
    return size.node.shape_env.create_symintnode(symbol, hint=None)


def defined_symbols(node: fx.Node) -> set[sympy.Symbol]:
    """The numbers that running a node tells."""
    return set(node.meta.get("unbacked_bindings") or ())


def surely_contiguous(value: torch.Tensor) -> bool:
    """A copy of a (fake) tensor is contiguous, whatever its sizes turn out to be."""
    return surely_strided_alike(torch.empty_like(value), value.new_empty(value.shape))


def surely_strided_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Two (fake) tensors have the same strides, whatever numbers that depend on data turn out to be."""
    if not (depends_on_data(one) or depends_on_data(other)):
        return one.stride() == other.stride()
    return [_expression(step) for step in one.stride()] == [_expression(step) for step in other.stride()]


def _expression(number: int | torch.SymInt) -> object:
    return number.node.expr if isinstance(number, torch.SymInt) else number


def hint(size: int | torch.SymInt) -> int:
    """A size as it was in the call of the capture; 1 where only running the graph tells."""
    return int(size.node.hint or 1) if isinstance(size, torch.SymInt) else int(size)


class _ValuedTracer(GraphAppendingTracer):
    """Gives every node that it writes its fake value."""

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        given = fx.map_arg(node.args, lambda source: source.meta["val"])
        node.meta["val"] = node.target(*given)  # pyright: ignore[reportCallIssue]
        return node


def emit_number(
    graph: fx.Graph, number: torch.SymInt | torch.SymFloat, symbols: Mapping[sympy.Symbol, fx.Node]
) -> fx.Node:
    """The nodes that compute a symbolic number from its symbols, at the place where the graph inserts; the last one.

    Raises:
        KeyError: A symbol of it is not among ``symbols``.
    """
    tracer = _ValuedTracer(graph)
    known = {symbol: fx.Proxy(node, tracer) for symbol, node in symbols.items()}
    result: Any = sympy_interp(PythonReferenceAnalysis, known, number.node.expr)  # pyright: ignore[reportArgumentType]
    return result.node


def is_view(operation: torch._ops.OpOverload) -> bool:
    """What an operation returns lies in its argument's memory, which it does not write."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in operation._schema.returns)


def is_wrapper(value: torch.Tensor) -> bool:
    """A tensor of a class of its own around others, which AOTAutograd takes apart."""
    return is_traceable_wrapper_subclass(value)


def storage_of(value: torch.Tensor) -> int:
    """An identity of the memory behind a (fake) tensor: equal for aliases. Under vmap, of what is mapped over."""
    while is_batchedtensor(value):
        value = get_unwrapped(value)
    return value.untyped_storage()._cdata


# ---- tracing --------------------------------------------------------------------------------------------------------


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Nested lists, tuples and dicts with the function's result for each tensor in them."""
    return pytree.tree_map_only(torch.Tensor, function, value)


def map_leaves(function: Callable[[Any], Any], value: Any, is_leaf: Callable[[Any], bool]) -> Any:
    """Nested lists, tuples and dicts, and what else torch knows to be made of values, with the function's result for
    each leaf, and for whatever ``is_leaf`` says is one."""
    return pytree.tree_map(function, value, is_leaf=is_leaf)


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


def mapped(function: Callable[..., Any], dims: Sequence[int | None]) -> Callable[..., Any]:
    """``torch.vmap`` over the arguments that have a dimension in ``dims``, without its loop over single calls.

    The result raises a RuntimeError where an operation has no rule for it.
    """
    over_all = torch.vmap(function, in_dims=tuple(dims))  # pyright: ignore[reportArgumentType]

    def call(*args: Any) -> Any:
        before = _is_vmap_fallback_enabled()
        _set_vmap_fallback_enabled(False)
        try:
            return over_all(*args)
        finally:
            _set_vmap_fallback_enabled(before)

    return call


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Give a text to tlparse (``TORCH_TRACE``); free when nobody listens."""
    trace_structured(
        "artifact", metadata_fn=lambda: {"name": f"cachepass_{name}", "encoding": "string"}, payload_fn=text
    )


def flops(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> int | None:
    """FLOPs of an operation on these (fake) tensors, by torch's own formulas; 0 where there is none. None: they depend
    on sizes that only running the graph tells, of which the formulas would ask."""
    packet = getattr(target, "_overloadpacket", None)
    is_attention = packet is not None and "scaled_dot_product" in packet.__name__ and "backward" not in packet.__name__
    if packet not in flop_registry and not is_attention:
        return 0
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs, value)) if isinstance(leaf, torch.Tensor)]
    if any(map(depends_on_data, tensors)):
        return None
    if packet in flop_registry:
        return hint(flop_registry[packet](*args, **kwargs, out_val=value))
    return hint(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))  # of these torch registers CUDA's only
