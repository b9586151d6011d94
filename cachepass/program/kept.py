"""Kept: which of the values that stay the same within a run are worth their memory.

    choose : ATen graph, what stays the same in it, budget -> Choice

Kept are values behind real work: matrix products, attentions, convolutions, and long enough reductions and
transcendental functions. Everything light is left where it is: views, casts and sums cost no more than reading what
they would be read from. Of a chain of light operations the smallest point is kept. A reduction of a value that is kept
too, such as its norm, is light: reading one costs as much as reading the other.

A value that is made of parameters alone is kept only where it is no larger than they are. Who stores weights in 4 bits,
or an adapter as two thin matrices, wants the memory more than the time; the whole weight would be kept beside them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import _torch
from ..capture.markers import reach_back
from ..errors import listing
from .emit import alias_root
from .flops import flops_of

_HEAVY_NUMEL = 4096  # elements from which a reduction or a transcendental function outweighs reading a kept value
_PRODUCTS = {
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "addmv",
    "mv",
    "convolution",
    "_scaled_mm",
    "_int_mm",
    "_weight_int8pack_mm",
}
_TRANSCENDENTAL = {"sin", "cos", "tan", "exp", "exp2", "expm1", "log", "log2", "log1p", "pow", "tanh", "sigmoid", "erf",
                   "rsqrt", "sqrt", "polar", "atan2"}  # fmt: skip
_MOVES = {"cat", "index", "embedding", "gather", "index_select", "repeat", "clone", "_to_copy", "constant_pad_nd",
          "where", "slice_scatter", "select_scatter", "copy", "flip", "roll", "stack", "masked_fill",
          "convert_element_type"}  # fmt: skip


@dataclass(frozen=True)
class LeftOut:
    """A value that is computed in every step although it stays the same in the run."""

    name: str
    bytes: int
    reason: str

    @staticmethod
    def told(left: Sequence[LeftOut]) -> list[str]:
        """For people, a line for each reason."""
        lines = []
        for reason in dict.fromkeys(value.reason for value in left):
            values = [value for value in left if value.reason == reason]
            count, size = f"{len(values)} value{'s' * (len(values) > 1)}", sum(value.bytes for value in values)
            names = listing([value.name for value in values], limit=8)
            lines.append(f"not kept for a run, computed in every step: {count} of {size} B, {reason}: {names}")
        return lines


@dataclass(frozen=True)
class Choice:
    """The values to keep, in graph order, and those that would be worth it but for their size."""

    kept: tuple[fx.Node, ...]
    left: tuple[LeftOut, ...]


@dataclass(frozen=True)
class _Candidates:
    """``heavy``: nodes with real work in them or before them; ``made_of``: of nodes that depend on parameters alone,
    these."""

    heavy: set[fx.Node]
    made_of: Mapping[fx.Node, frozenset[fx.Node]]

    def is_larger(self, node: fx.Node) -> bool:
        """Than the parameters that it is made of. What is made of nothing, a table of constants, is larger than no
        parameter."""
        sources = self.made_of.get(node)
        return bool(sources) and bytes_of_value(node) > sum(map(bytes_of_value, sources))


def choose(graph: fx.Graph, same: set[fx.Node], parameters: Collection[fx.Node], budget: int | None) -> Choice:
    """Choose the values at which real work ends and what varies, or light work on it, begins. ``budget``: bytes of all;
    None: no bound."""
    heavy: set[fx.Node] = set()
    for node in graph.nodes:
        if node in same and (is_heavy(node) or any(source in heavy for source in node.all_input_nodes)):
            heavy.add(node)
    candidates = _Candidates(heavy, _made_of(graph, same, parameters))
    ends = [node for node in graph.nodes if node in heavy and any(user not in same for user in node.users)]
    found = {kept for end in ends for kept in _smallest(end, candidates)}
    larger = [
        LeftOut(end.name, bytes_of_value(end), "larger than the parameters alone that make it")
        for end in ends
        if candidates.is_larger(end)
    ]
    kept, over = _within(_far_from_others([node for node in graph.nodes if node in found]), budget)
    return Choice(tuple(kept), (*larger, *over))


def _far_from_others(kept: Sequence[fx.Node]) -> list[fx.Node]:
    """Without those that light work and reductions make of others that are kept, which are no larger."""
    left = set(kept)
    for node in kept:
        read: set[fx.Node] = set()
        pending = [node]
        while pending:
            current = pending.pop()
            if current is not node and (current in left or current.op != "call_function"):
                read.add(current)
            elif _is_work_beside(current, bytes_of_value(node)):
                break
            else:
                pending.extend(current.all_input_nodes)
        else:
            if read & left and sum(map(bytes_of_value, read)) <= 1.01 * bytes_of_value(node):
                left.discard(node)
    return [node for node in kept if node in left]


def _made_of(graph: fx.Graph, same: set[fx.Node], parameters: Collection[fx.Node]) -> dict[fx.Node, frozenset[fx.Node]]:
    """The parameters of every node that depends on nothing else."""
    found: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        if node in parameters or (node.op == "get_attr" and node in same):
            found[node] = frozenset([node])
        elif node in same and node.op == "call_function" and all(source in found for source in node.all_input_nodes):
            found[node] = frozenset().union(*(found[source] for source in node.all_input_nodes))
    return found


def _smallest(node: fx.Node, candidates: _Candidates) -> set[fx.Node]:
    """The node, or those that it is made of by light work, if they are no larger."""
    sources = {source for source in node.all_input_nodes if source in candidates.heavy}
    value = node.meta.get("val")
    if _keepable(value) and not candidates.is_larger(node):
        is_view = alias_root(node) is not node
        before = sum(map(bytes_of_value, sources))
        if is_heavy(node) or (not is_view and bytes_of_value(node) <= before):
            return {node}
    elif is_heavy(node) and not candidates.is_larger(node):
        return set()
    return {found for source in sources for found in _smallest(source, candidates)}


def _within(nodes: Sequence[fx.Node], budget: int | None) -> tuple[list[fx.Node], list[LeftOut]]:
    """The values that save most work for each byte of the budget."""
    sizes = {node: bytes_of_value(node) for node in nodes}
    if budget is None or sum(sizes.values()) <= budget:
        return list(nodes), []
    worth = {node: _work(node) / max(sizes[node], 1) for node in nodes}
    kept: set[fx.Node] = set()
    used = 0
    for node in sorted(nodes, key=worth.__getitem__, reverse=True):
        if used + sizes[node] <= budget:
            kept.add(node)
            used += sizes[node]
    reason = f'beyond the budget of {budget} B, options["invariant_bytes"]'
    return [n for n in nodes if n in kept], [LeftOut(n.name, sizes[n], reason) for n in nodes if n not in kept]


def _work(node: fx.Node) -> int:
    """The work of computing a value: FLOPs, and for what has none the elements that it writes."""
    reached = [n for n in reach_back([node], set()) if n.op == "call_function"]
    return sum(flops_of(n) or bytes_of_value(n) for n in reached)


def _keepable(value: Any) -> bool:
    """A tensor without gaps, which a slot of the same strides can hold."""
    if not isinstance(value, torch.Tensor) or (value.is_complex() and value.is_conj()):
        return False
    return tuple(torch.empty_like(value).stride()) == tuple(value.stride())


def bytes_of_value(node: fx.Node) -> int:
    """Sizes that are symbols count as those that the graph was captured with."""
    return bytes_in(node.meta.get("val"))


def bytes_in(value: object) -> int:
    """Of a (fake) tensor, or of several."""
    tensors = [v for v in _leaves(value) if isinstance(v, torch.Tensor)]
    return sum(math.prod(map(_torch.hint, v.shape)) * v.dtype.itemsize for v in tensors)


def is_heavy(node: fx.Node) -> bool:
    """There is real work in it."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target.overloadpacket.__name__
    if is_product(node.target):
        return True
    if not node.all_input_nodes or alias_root(node) is not node or name in _MOVES:
        return False
    if torch.Tag.pointwise in node.target.tags and name not in _TRANSCENDENTAL:
        return False
    read = [source.meta.get("val") for source in node.all_input_nodes]
    sizes = [
        math.prod(map(_torch.hint, v.shape)) for value in read for v in _leaves(value) if isinstance(v, torch.Tensor)
    ]
    return max(sizes, default=0) >= _HEAVY_NUMEL


def is_product(operation: torch._ops.OpOverload) -> bool:
    """A matrix product, a convolution or an attention."""
    name = operation.overloadpacket.__name__
    return name in _PRODUCTS or "scaled_dot_product" in name or "conv" in name.split("_")


def _is_work_beside(node: fx.Node, size: int) -> bool:
    """More work than reading so many bytes: a product, or a transcendental function of as much."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target.overloadpacket.__name__
    return is_product(node.target) or (name in _TRANSCENDENTAL and 16 * bytes_of_value(node) > size)


def _leaves(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)
