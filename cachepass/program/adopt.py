"""Adopt: a slot takes over the memory of the value that is kept, instead of a copy of it.

    adopt : ATen GraphModule of a program, its roles -> the same without copies into some slots, and which slots

        v = addmm(b, x, w)                        v = addmm(b, x, w)
        copy_(next, v)                ->          return y, v          (the host: next.set_(v))
        return y

A kernel that Inductor writes puts its value into the slot by itself. A matrix product, an attention or a convolution is
torch's own: its result would be copied, which reads and writes all of it once more. So the program returns it, and the
slot's old memory is given back before the program runs: no more is allocated than with the copy. Not with CUDA graphs,
whose memory is their own.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from .. import _torch
from ..capture.nodes import copied, operand, returned_by
from .emit import Emitter, alias_root, aten
from .kept import is_product
from .roles import History, Next, Role


@dataclass(frozen=True)
class Adoption:
    """A graph without copies into slots.

    Attributes:
        gm: The graph; its last outputs are what the slots take over.
        slots: Indices of the slots among its placeholders, in the order of these outputs. It reads none of them.
    """

    gm: fx.GraphModule
    slots: tuple[int, ...]


def adopt(gm: fx.GraphModule, roles: Sequence[Role], own: int) -> Adoption:
    """Return what slots can take over; ``gm`` is left as it is. ``roles``: of the placeholders behind the model's own,
    of which there are ``own``."""
    if not _writes(gm.graph, roles, own):
        return Adoption(gm, ())
    graph = copied(gm.graph)
    writes = _writes(graph, roles, own)
    end = graph.output_node()
    emit = Emitter(graph, _torch.fake_mode_of([node.meta.get("val") for node in graph.find_nodes(op="placeholder")]))
    values = []
    with graph.inserting_before(end):
        for write in writes.values():
            slot, value = operand(write), operand(write, 1)
            values.append(emit.held(value, slot.meta["val"].stride()))
    for write in writes.values():
        graph.erase_node(write)
    visible = end.meta.get("user_visible_output_idxs")
    end.args = ((*returned_by(graph), *values),)
    if visible is not None:  # their strides are the slots'
        first = len(returned_by(graph)) - len(values)
        end.meta["user_visible_output_idxs"] = [*visible, *range(first, first + len(values))]
    graph.lint()
    return Adoption(_torch.graph_module(gm, graph), tuple(writes))


def _writes(graph: fx.Graph, roles: Sequence[Role], own: int) -> dict[int, fx.Node]:
    """Copies whose value a slot can take over, by the slot's index: it owns its memory, and nobody else keeps it."""
    placeholders = graph.find_nodes(op="placeholder")
    slots = {placeholders[own + i]: (own + i, role) for i, role in enumerate(roles) if isinstance(role, Next)}
    read = {role.cut for role in roles if isinstance(role, History)}  # a ring of one slot: it is read, too
    taken = {alias_root(value) for value in returned_by(graph) if isinstance(value, fx.Node)}
    found: dict[int, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=aten.copy_.default):
        index, role = slots.get(operand(node), (None, None))
        value = node.args[1]
        if index is None or role is None or role.cut in read or len(operand(node).users) > 1:
            continue
        if not isinstance(value, fx.Node) or node.users or not _fits(operand(node), value):
            continue
        root = alias_root(value)
        if _is_torchs_own(root) and root not in taken and _has_all(root, value):
            taken.add(root)
            found[index] = node
    return found


def _fits(slot: fx.Node, value: fx.Node) -> bool:
    one, other = slot.meta["val"], value.meta["val"]
    fixed = all(isinstance(n, int) for n in (*one.shape, *one.stride(), *other.shape))
    return fixed and one.shape == other.shape and one.dtype == other.dtype


def _is_torchs_own(node: fx.Node) -> bool:
    source = operand(node) if node.target is operator.getitem else node
    return isinstance(source.target, torch._ops.OpOverload) and is_product(source.target)


def _has_all(root: fx.Node, value: fx.Node) -> bool:
    """Nothing of the memory is something else's."""
    whole = root.meta["val"]
    return isinstance(whole, torch.Tensor) and whole.numel() == value.meta["val"].numel()
