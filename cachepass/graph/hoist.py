"""Hoist: what stays the same within a run is computed once, by a program of its own.

    hoist : ATen GraphModule, varying inputs -> Hoisted (the once-program and what it keeps), GraphModule without it

        k = mm(text, wk)                                once:  copy_(kept[k], mm(text, wk))
        a = sdpa(mm(x, wq), k, ...)           ->        step:  a = sdpa(mm(x, wq), kept[k], ...)

A value stays the same if all that it depends on does: parameters, and inputs other than latents and timestep. That is
a presumption made at capture; whether it holds is checked at every call, by the tensors' identity (see
``runtime/invariants.py``), so results are exact in any case. Kept are values behind real work: matrix products,
attentions, convolutions, and long enough reductions and transcendental functions. Everything light is left where it is:
views, casts and sums cost no more than reading what they would be read from.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import _torch
from .annotate import CUT, OUTPUT
from .emit import Emitter, alias_root, aten
from .liveness import is_impure, reach_back
from .rewrite import drop_marker
from .slots import NamedSlot
from .state_inputs import Role, empty_slot

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


@dataclass(frozen=True, eq=False)
class Hoisted:
    """What was taken out of a graph.

    Attributes:
        once: The program that computes it: the model's own inputs, then the slots that it writes.
        slots: What is kept.
        roles: Of the slots, in ``once`` and in the graph that reads them.
        reads: Which of the model's own inputs the values depend on.
        regions: Ids of the regions that are in it, and would have been cut.
        operations: Number of operations that no longer run in every step.
    """

    once: fx.GraphModule
    slots: tuple[NamedSlot, ...]
    roles: dict[str, Role]
    reads: tuple[int, ...]
    regions: tuple[str, ...]
    operations: int

    @property
    def slot_bytes(self) -> int:
        return sum(slot.slot_bytes for slot in self.slots)

    @property
    def sizes(self) -> list[int | torch.SymInt]:
        """All sizes and strides of what is kept."""
        return [size for slot in self.slots for size in (*slot.shape, *slot.stride)]


def invariant_nodes(graph: fx.Graph, varying: Collection[int], *, through_cuts: bool) -> set[fx.Node]:
    """All nodes that depend on nothing that varies; ``varying`` are indices of placeholders. ``through_cuts``: what is
    cut is as invariant as the value itself; if not, it counts as varying."""
    written = {node.args[0] for node in graph.nodes if node.op == "call_function" and is_impure(node)}
    changing = {node for i, node in enumerate(graph.find_nodes(op="placeholder")) if i in varying}
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            same = node not in changing and node not in written
        elif node.op == "get_attr":
            same = isinstance(node.meta.get("val"), torch.Tensor)
        else:
            same = (through_cuts or node.target is not CUT) and _is_function(node)
            same = same and all(source in found for source in node.all_input_nodes)
        if same:
            found.add(node)
    return found


def _is_function(node: fx.Node) -> bool:
    """Its value is one of its inputs' values alone."""
    if node.op != "call_function" or isinstance(node.target, torch._ops.HigherOrderOperator) or is_impure(node):
        return False
    if node.target is CUT:
        return node.args[1] != OUTPUT
    if _torch.is_collective(node):  # another rank's input may change while this one's stays the same
        return False
    values = node.meta.get("val")
    if any(isinstance(v, torch.Tensor) and _torch.depends_on_data(v) for v in _leaves(values)):
        return False
    seeded = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
    return not seeded or _is_attention(node)


def _is_attention(node: fx.Node) -> bool:
    """An attention kernel without dropout (the tag is on all of them)."""
    if "scaled_dot_product" not in str(node.target):
        return False
    names = [argument.name for argument in node.target._schema.arguments]  # pyright: ignore
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return not given.get("dropout_p")


def _leaves(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


def invariant_regions(graph: fx.Graph, varying: Collection[int]) -> set[str]:
    """Ids of the regions all of whose cuts stay the same: computed once, they need no forecast."""
    same = invariant_nodes(graph, varying, through_cuts=True)
    cuts: dict[str, bool] = {}
    for node in graph.find_nodes(op="call_function", target=CUT):
        region = str(node.args[1])
        cuts[region] = cuts.get(region, True) and node in same
    return {region for region, invariant in cuts.items() if invariant}


def hoist(gm: fx.GraphModule, varying: Collection[int], regions: Collection[str],
          fake_mode: AbstractContextManager[Any]) -> tuple[fx.GraphModule, Hoisted | None]:  # fmt: skip
    """Split a graph, whose values are of ``fake_mode``; ``gm`` is left as it is. Cuts of ``regions`` are dropped,
    others count as varying."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {})).meta = dict(gm.graph.output_node().meta)
    emit = Emitter(graph, fake_mode)
    for marker in graph.find_nodes(op="call_function", target=CUT):
        if marker.args[1] in regions:
            drop_marker(marker, emit)
    kept = _kept(graph, invariant_nodes(graph, varying, through_cuts=False))
    if not kept:
        return gm, None
    placeholders = graph.find_nodes(op="placeholder")
    slots = {node: _slot_for(node) for node in kept}
    once = _once(gm, graph, slots, fake_mode)
    roles, first = {}, placeholders[-1].next
    for node, slot in slots.items():
        with graph.inserting_before(first), emit.fake_mode:
            stand_in = emit.placeholder(f"once_{node.name}", empty_slot(slot))
        node.replace_all_uses_with(stand_in)
        roles[stand_in.name] = Role("invariant", "", slot=slot.name)
    before = len(graph.nodes)
    graph.eliminate_dead_code(is_impure_node=is_impure)
    graph.lint()
    own = {node.name: i for i, node in enumerate(placeholders)}
    reads = tuple(own[node.name] for node in once.graph.find_nodes(op="placeholder") if node.users and node.name in own)
    return fx.GraphModule(gm, graph), Hoisted(
        once, tuple(slots.values()), roles, reads, tuple(sorted(regions)), before - len(graph.nodes)
    )


# ---- what is worth keeping ------------------------------------------------------------------------------------------


def _kept(graph: fx.Graph, same: set[fx.Node]) -> list[fx.Node]:
    """The values to keep, in graph order: where real work ends and what varies, or light work on it, begins."""
    heavy: set[fx.Node] = set()  # nodes with real work in them or before them
    for node in graph.nodes:
        if node in same and (_is_heavy(node) or any(source in heavy for source in node.all_input_nodes)):
            heavy.add(node)
    kept: set[fx.Node] = set()
    for node in graph.nodes:
        if node in heavy and any(user not in same for user in node.users):
            kept |= _smallest(node, heavy)
    return [node for node in graph.nodes if node in kept]


def _smallest(node: fx.Node, heavy: set[fx.Node]) -> set[fx.Node]:
    """The node, or those that it is made of by light work, if they are no larger."""
    sources = {source for source in node.all_input_nodes if source in heavy}
    value = node.meta.get("val")
    if _is_heavy(node):
        return {node} if _keepable(value) else set()
    is_view = alias_root(node) is not node or not isinstance(value, torch.Tensor)
    if is_view or _bytes(value) > sum(_bytes(source.meta.get("val")) for source in sources) or not _keepable(value):
        return {found for source in sources for found in _smallest(source, heavy)}
    return {node}


def _keepable(value: Any) -> bool:
    """A tensor without gaps, which a slot of the same strides can hold."""
    if not isinstance(value, torch.Tensor) or (value.is_complex() and value.is_conj()):
        return False
    return tuple(torch.empty_like(value).stride()) == tuple(value.stride())


def _bytes(value: Any) -> int:
    tensors = [v for v in _leaves(value) if isinstance(v, torch.Tensor)]
    return sum(math.prod(map(_torch.hint, v.shape)) * v.dtype.itemsize for v in tensors)


def _is_heavy(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target.overloadpacket.__name__
    if name in _PRODUCTS or "scaled_dot_product" in name or "conv" in name.split("_"):
        return True
    if not node.all_input_nodes or alias_root(node) is not node or name in _MOVES:
        return False
    if torch.Tag.pointwise in node.target.tags and name not in _TRANSCENDENTAL:
        return False
    read = [source.meta.get("val") for source in node.all_input_nodes]
    tensors = [v for value in read for v in _leaves(value) if isinstance(v, torch.Tensor)]
    sizes = [math.prod(map(_torch.hint, v.shape)) for v in tensors]
    return max(sizes, default=0) >= _HEAVY_NUMEL


# ---- the once-program -----------------------------------------------------------------------------------------------


def _slot_for(node: fx.Node) -> NamedSlot:
    value: torch.Tensor = node.meta["val"]
    return NamedSlot(node.name, tuple(value.shape), tuple(value.stride()), value.dtype, value.device)


def _once(owner: fx.GraphModule, graph: fx.Graph, slots: dict[fx.Node, NamedSlot],
          fake_mode: AbstractContextManager[Any]) -> fx.GraphModule:  # fmt: skip
    """The kept values, each written to its slot."""
    needed = reach_back(slots, set())
    once = fx.Graph()
    env = {node: once.node_copy(node) for node in graph.find_nodes(op="placeholder")}
    emit = Emitter(once, fake_mode)
    with emit.fake_mode:
        targets = [emit.placeholder(f"once_{slot.name}", empty_slot(slot)) for slot in slots.values()]
    for node in graph.nodes:
        if node in needed and node not in env:
            env[node] = once.node_copy(node, env.__getitem__)
    for node, target in zip(slots, targets, strict=True):
        emit(aten.copy_.default, target, env[node])
    once.output(())
    once.lint()
    return fx.GraphModule(owner, once)
