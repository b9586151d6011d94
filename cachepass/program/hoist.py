"""Hoist: what stays the same within a run is computed once, by a program of its own.

    hoist : ATen GraphModule, varying inputs -> Hoisted (the once-program and what it keeps), GraphModule without it

        k = mm(text, wk)                                once:  copy_(kept[k], mm(text, wk))
        a = sdpa(mm(x, wq), k, ...)           ->        step:  a = sdpa(mm(x, wq), kept[k], ...)

A value stays the same if all that it depends on does: parameters, and inputs other than latents and timestep. That is
a presumption made at capture; whether it holds is checked at every call, by the tensors' identity (see
``run/invariants.py``), so results are exact in any case. What of it is worth its memory, ``program/kept.py`` says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import _torch
from ..capture.annotate import CUT, OUTPUT
from ..capture.markers import reach_back
from ..capture.nodes import arguments_of, copied
from .emit import Emitter, aten
from .kept import LeftOut, choose, is_heavy
from .liveness import is_impure
from .rewrite import drop_marker
from .roles import Invariant, Role
from .slots import NamedSlot
from .state_inputs import empty_slot


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


@dataclass(frozen=True)
class Split:
    """A graph without what stays the same, what was taken out of it, and what was left in it for its size."""

    gm: fx.GraphModule
    hoisted: Hoisted | None
    left: tuple[LeftOut, ...]


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
    return not arguments_of(node.target, node.args, node.kwargs).get("dropout_p")


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


def hoist(
    gm: fx.GraphModule,
    varying: Collection[int],
    parameters: Collection[int],
    regions: Collection[str],
    budget: int | None,
    fake_mode: AbstractContextManager[Any],
) -> Split:
    """Split a graph, whose values are of ``fake_mode``; ``gm`` is left as it is. Cuts of ``regions`` are dropped,
    others count as varying. ``parameters`` are indices of placeholders; ``budget``: bytes of all that is kept."""
    graph = copied(gm.graph)
    emit = Emitter(graph, fake_mode)
    values: dict[str, list[fx.Node]] = {}
    for marker in graph.find_nodes(op="call_function", target=CUT):
        if marker.args[1] in regions:
            values.setdefault(str(marker.args[1]), []).append(drop_marker(marker, emit))
    placeholders = graph.find_nodes(op="placeholder")
    own_weights = {node for i, node in enumerate(placeholders) if i in parameters}
    choice = choose(graph, invariant_nodes(graph, varying, through_cuts=False), own_weights, budget)
    if not choice.kept:
        return Split(_torch.graph_module(gm, graph) if choice.left else gm, None, choice.left)
    slots = {node: _slot_for(node) for node in choice.kept}
    once = _once(gm, graph, slots, fake_mode)
    roles, first = {}, placeholders[-1].next
    for node, slot in slots.items():
        with graph.inserting_before(first), emit.fake_mode:
            stand_in = emit.placeholder(f"once_{node.name}", empty_slot(slot))
        node.replace_all_uses_with(stand_in)
        roles[stand_in.name] = Invariant(slot.name)
    before = len(graph.nodes)
    graph.eliminate_dead_code(is_impure_node=is_impure)
    graph.lint()
    own = {node.name: i for i, node in enumerate(placeholders)}
    reads = tuple(own[node.name] for node in once.graph.find_nodes(op="placeholder") if node.users and node.name in own)
    computed = tuple(sorted(region for region in regions if not _has_work(values.get(region, ()), graph)))
    hoisted = Hoisted(once, tuple(slots.values()), roles, reads, computed, before - len(graph.nodes))
    return Split(_torch.graph_module(gm, graph), hoisted, choice.left)


def _has_work(values: Sequence[fx.Node], graph: fx.Graph) -> bool:
    """Something that is worth keeping is still computed for these values in every step."""
    present = set(graph.nodes)
    return any(is_heavy(node) for node in reach_back([v for v in values if v in present], set()))


# ---- the once-program -----------------------------------------------------------------------------------------------


def _slot_for(node: fx.Node) -> NamedSlot:
    value: torch.Tensor = node.meta["val"]
    return NamedSlot(node.name, tuple(value.shape), tuple(value.stride()), value.dtype, value.device)


def _once(
    owner: fx.GraphModule, graph: fx.Graph, slots: dict[fx.Node, NamedSlot], fake_mode: AbstractContextManager[Any]
) -> fx.GraphModule:
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
    return _torch.graph_module(owner, once)
