"""Writing ATen nodes: with their fake values, because everything after AOTAutograd reads ``meta["val"]``."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from .. import _torch
from ..recipe.frequency import wide_dtype
from .plan import PlannedCut

aten = torch.ops.aten
EMITTED = "cached_"  # how the names of emitted nodes begin
TO_THE_END = 2**63 - 1  # how ATen writes the end of a slice that has none
CONVERT = torch.ops.prims.convert_element_type.default
_ORIGIN = "nn_module_stack", "stack_trace"  # which module and line of the model a node is of


class Emitter:
    """Adds nodes at a place of one graph, computing each one's fake value."""

    def __init__(self, graph: fx.Graph, fake_mode: contextlib.AbstractContextManager[Any]) -> None:
        self.graph, self.fake_mode = graph, fake_mode
        self._origin: dict[str, Any] = {}

    @contextlib.contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """What is emitted in this block stands before a node, and is of the same module and line."""
        with self.graph.inserting_before(node), self.of(node):
            yield

    @contextlib.contextmanager
    def of(self, node: fx.Node) -> Iterator[None]:
        """What is emitted in this block is of the same module and line as a node, of this graph or another."""
        before = self._origin
        self._origin = {key: node.meta[key] for key in _ORIGIN if key in node.meta}
        yield
        self._origin = before

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        args, kwargs = fx.node.map_aggregate((args, kwargs), self.number)  # pyright: ignore
        # A stem of their own: the model's nodes keep their names, so prints differ only where something changed.
        name = EMITTED + getattr(getattr(target, "overloadpacket", target), "__name__", "node").strip("_")
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        node.meta.update(self._origin)
        fake = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.fake_mode, torch.no_grad():
            node.meta["val"] = target(*fake[0], **fake[1])  # pyright: ignore
        return node

    def placeholder(self, name: str, value: object) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def to(self, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        return value if value.meta["val"].dtype == dtype else self(CONVERT, value, dtype)

    def dense(self, value: fx.Node, marker: fx.Node) -> fx.Node:
        """``value`` with the strides that the marker gave to everything behind it (it densifies, as clone does)."""
        same = _torch.surely_strided_alike(value.meta["val"], marker.meta["val"])
        return value if same else self(aten.clone.default, value)

    def strided(self, value: fx.Node, strides: Sequence[int | torch.SymInt]) -> fx.Node:
        """``value`` with exactly these dense strides, for the branches of a conditional, which must agree; dropped
        when the branch is inlined (what differs are strides that dimensions of size 1 carry)."""
        result = self.restrided(value, strides)
        node: Any = result
        while node is not value:
            node.meta["cachepass_unalias"] = True
            node = node.args[0]
        return result

    def restrided(self, value: fx.Node, strides: Sequence[int | torch.SymInt]) -> fx.Node:
        """``value`` with exactly these dense strides: copied where they differ."""
        own = value.meta["val"].stride()
        if any(isinstance(step, torch.SymInt) for step in (*own, *strides)) or tuple(own) == tuple(strides):
            return value
        order = sorted(range(len(strides)), key=lambda d: (-int(strides[d]), d))
        ordered = self(aten.permute.default, value, order)
        copy = self(aten.clone.default, ordered, memory_format=torch.contiguous_format)
        return self(aten.permute.default, copy, [order.index(d) for d in range(len(order))])

    def residual(self, value: fx.Node, base: fx.Node | None) -> fx.Node:
        """What is kept of a value: all of it, or what it adds to ``base``."""
        return value if base is None else self(aten.sub.Tensor, value, base)

    def held(self, value: fx.Node, strides: Sequence[int | torch.SymInt]) -> fx.Node:
        """``value``, compiled so that it has these dense strides (no copy where Inductor would choose them anyway)."""
        node = self.graph.call_function(_torch.FORCE_STRIDES, (value, tuple(map(self.number, strides))))
        with self.fake_mode:
            like = value.meta["val"]
            node.meta["val"] = torch.empty_strided(like.shape, strides, dtype=like.dtype, device=like.device)
        return node

    def clone(self, value: fx.Node) -> fx.Node:
        """A copy made only because a branch may not return an alias; dropped when the branch is inlined."""
        node = self(aten.clone.default, value)
        node.meta["cachepass_unalias"] = True
        return node

    def forecast(self, cut: PlannedCut, history: Sequence[fx.Node], weights: fx.Node | None) -> fx.Node:
        """``sum_j w_j * h_j`` in the cut's dtype, accumulated in fp32 (fp64 for fp64 values)."""
        if cut.forecast.history == 0:
            return self._zeros(cut)
        if cut.forecast.constant_weights == (1.0,):
            return self.to(history[0], cut.dtype)
        wide = wide_dtype(cut.dtype)
        total: fx.Node | None = None
        for j, slot in enumerate(history):
            weight = self._weight(cut, weights, j, wide)
            term = self(aten.mul.Tensor, self.to(slot, wide), weight)
            total = term if total is None else self(aten.add.Tensor, total, term)
        assert total is not None
        return self.to(total, cut.dtype)

    def _weight(self, cut: PlannedCut, weights: fx.Node | None, j: int, wide: torch.dtype) -> fx.Node | float:
        if cut.forecast.constant_weights is not None:
            return cut.forecast.constant_weights[j]
        assert weights is not None, cut.name
        return self.to(self(aten.select.int, weights, 0, cut.row * cut.forecast.history + j), wide)

    def traced(self, function: Callable[..., Any], *args: Any) -> Any:
        """The nodes of a torch function, traced; ``args`` and the result are nodes, in any nesting of lists."""
        leaves, spec = _torch.flatten(args)
        with self.fake_mode, torch.no_grad():
            gm, result_spec = _torch.trace(function, [leaf.meta["val"] for leaf in leaves], spec)
        env = dict(zip(gm.graph.find_nodes(op="placeholder"), leaves, strict=True))
        for node in gm.graph.nodes:
            if node.op == "call_function":
                copied = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = self(node.target, *copied[0], **copied[1])
        returned: Any = gm.graph.output_node().args[0]
        results = [env[node] for node in returned]
        return _torch.unflatten(results, result_spec)

    def _zeros(self, cut: PlannedCut) -> fx.Node:
        """Zeros in the cut's own memory layout: made in stride order, then permuted."""
        order = sorted(range(len(cut.shape)), key=lambda d: (-_torch.hint(cut.stride[d]), d))
        shape = [cut.shape[d] for d in order]
        zeros = self(aten.full.default, shape, 0, dtype=cut.dtype, device=cut.device, pin_memory=False)
        if order == sorted(order):
            return zeros
        return self(aten.permute.default, zeros, [order.index(d) for d in range(len(order))])

    def number(self, number: Any) -> Any:
        """A number as an argument of a node: a symbolic one as a node too, because what runs the graph as Python code
        knows no symbols."""
        if not isinstance(number, (torch.SymInt, torch.SymFloat)):
            return number
        wanted, placeholders = number.node.expr, self.graph.find_nodes(op="placeholder")
        carried: dict[sympy.Expr, tuple[fx.Node, int]] = {}
        symbols: dict[sympy.Symbol, fx.Node] = {}
        for node in placeholders:
            value = node.meta.get("val")
            if isinstance(value, (torch.SymInt, torch.SymFloat)):
                if value.node.expr == wanted:
                    return node
                symbols[value.node.expr] = node
            elif isinstance(value, torch.Tensor):
                sizes = [(size, d) for d, size in enumerate(value.shape) if isinstance(size, torch.SymInt)]
                carried |= {size.node.expr: (node, d) for size, d in sizes if size.node.expr not in carried}
        if wanted in carried:
            return self(aten.sym_size.int, *carried[wanted])
        for symbol in wanted.free_symbols - symbols.keys():
            if symbol in carried:
                symbols[symbol] = self(aten.sym_size.int, *carried[symbol])
        return _torch.emit_number(self.graph, number, symbols)


def alias_root(node: fx.Node) -> fx.Node:
    """The node whose memory ``node`` is a view of (itself, if it owns its memory)."""
    while node.op == "call_function":
        if node.target is operator.getitem or (
            isinstance(node.target, torch._ops.OpOverload) and _torch.is_view(node.target)
        ):
            source = node.args[0]
        else:
            break
        if not isinstance(source, fx.Node) or (node.target is operator.getitem and not _views_list(source)):
            break
        node = source
    return node


def _views_list(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and _torch.is_view(node.target)


def operands_of(nodes: Sequence[fx.Node]) -> Iterator[fx.Node]:
    """What a set of nodes reads from outside itself, in order, once each."""
    inside, seen = set(nodes), set()
    for node in nodes:
        for operand in node.all_input_nodes:
            if operand not in inside and operand not in seen:
                seen.add(operand)
                yield operand
