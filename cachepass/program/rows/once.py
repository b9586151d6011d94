"""Row once: what stays the same within a run, where several requests are called at once.

The tensors of such a call are made anew for each, so their identity tells nothing. Of the values that are computed once
per run (``hoist.py``), therefore,

    those that depend on nothing that differs from row to row    are kept once, for all requests, and checked
    those that the user says stay the same                       are kept by each request (options["invariant_inputs"])
    all others                                                   are computed in every step, in the program itself
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import fx

from ... import _torch
from ...capture.markers import reach_back
from ...capture.nodes import copied, operand
from ..emit import aten
from ..liveness import is_impure
from ..once import Invariants
from ..roles import Invariant
from ..specialize import Variant
from ..trace import Traced


@dataclass(frozen=True)
class Sorted:
    """The values that are computed once per run, by name: for all requests, for each, or in every step after all."""

    shared: frozenset[str] = frozenset()
    own: frozenset[str] = frozenset()
    every_step: frozenset[str] = frozenset()


def sort_kept(traced: Traced, differ: Collection[int]) -> Sorted:
    """Sort what a graph keeps for a run. ``differ``: indices of the inputs that differ from row to row."""
    if traced.hoisted is None:
        return Sorted()
    found: dict[str, set[str]] = {"shared": set(), "own": set(), "every_step": set()}
    placeholders = traced.hoisted.once.graph.find_nodes(op="placeholder")
    index = {node: i for i, node in enumerate(placeholders[: len(traced.inputs)])}
    for slot, write in zip(traced.hoisted.slots, _writes(traced.hoisted.once.graph), strict=True):
        reached = {index[node] for node in reach_back([operand(write, 1)], set()) if node in index}
        reads = reached & set(differ)
        kind = "shared" if not reads else "own" if reads <= traced.declared else "every_step"
        found[kind].add(slot.name)
    return Sorted(*(frozenset(found[kind]) for kind in ("shared", "own", "every_step")))


def _writes(once: fx.Graph) -> list[fx.Node]:
    """What writes the slots, in their order."""
    return once.find_nodes(op="call_function", target=aten.copy_.default)


def part_of(
    traced: Traced, kept: Invariants, names: Collection[str], differ: Collection[int]
) -> tuple[Invariants, Variant] | None:
    """Some of what is kept, and the graph that computes it; None: there is nothing."""
    if traced.hoisted is None or not names:
        return None
    slots = tuple(slot for slot in traced.hoisted.slots if slot.name in names)
    checked = tuple(i for i in kept.checked if i not in differ)
    graph = copied(traced.hoisted.once.graph)
    roles = []
    placeholders = graph.find_nodes(op="placeholder")[len(traced.inputs) :]
    for placeholder, write, slot in zip(placeholders, _writes(graph), traced.hoisted.slots, strict=True):
        if slot.name in names:
            roles.append(Invariant(slot.name))
            continue
        graph.erase_node(write)
        graph.erase_node(placeholder)
    graph.eliminate_dead_code(is_impure_node=is_impure)
    graph.lint()
    variant = Variant("once for rows", _torch.graph_module(traced.hoisted.once, graph), tuple(roles), repeated=False)
    return dataclasses.replace(kept, slots=slots, checked=checked), variant


def in_every_step(variant: Variant, traced: Traced, names: Collection[str]) -> Variant:
    """A variant that computes some of what was to be kept."""
    if traced.hoisted is None or not names:
        return variant
    graph, own = fx.Graph(), len(traced.inputs)
    source, once = variant.gm.graph, traced.hoisted.once.graph
    env: dict[fx.Node, Any] = {}
    know: Callable[[fx.Node], Any] = env.__getitem__
    placeholders, roles = source.find_nodes(op="placeholder"), []
    added = dict(zip(placeholders[own:], variant.inputs, strict=True))
    inlined = {role.name: node for node, role in added.items() if isinstance(role, Invariant) and role.name in names}
    for node in placeholders:
        if node not in inlined.values():
            env[node] = graph.node_copy(node)
            roles += [added[node]] if node in added else []
    once_placeholders = once.find_nodes(op="placeholder")
    env |= {theirs: env[ours] for theirs, ours in zip(once_placeholders, placeholders[:own], strict=False)}
    writes = dict(zip((slot.name for slot in traced.hoisted.slots), _writes(once), strict=True))
    values = {name: operand(writes[name], 1) for name in inlined}
    needed = reach_back(values.values(), set())
    for node in once.nodes:
        if node in needed and node not in env:
            env[node] = graph.node_copy(node, know)
    env |= {node: env[values[name]] for name, node in inlined.items()}
    for node in source.nodes:
        if node.op != "placeholder":
            env[node] = graph.node_copy(node, know)
    graph.lint()
    return dataclasses.replace(variant, gm=_torch.graph_module(variant.gm, graph), inputs=tuple(roles))
