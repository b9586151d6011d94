"""Split: a program that a decision is made in becomes two, with the host between them.

    prefix : canonical form -> the program up to the distance
    suffix : graph of a phase -> what remains of it, given what the prefix computed

        h = mlp(x)                                  prefix:   h = mlp(x); d = distance(h, kept); return h, d
        d = distance(h, kept)               ->                ... the host reads d and chooses the phase ...
        y = blocks(h) or h + forecast               suffix:   y = blocks(h); copy_(kept, h)
        return y, d

Everything that the distance depends on is in the prefix, which is the same in all phases; what of it the rest reads is
*carried* over. Sizes are computed in both.
"""

from __future__ import annotations

import torch
from torch import fx

from .. import _torch
from ..capture.nodes import returned_by
from .emit import Emitter, aten
from .liveness import is_impure
from .probe import CARRIED, PREFIX, is_number
from .rewrite import Canonical, drop_unread
from .roles import Carried, Role


def prefix(canonical: Canonical) -> tuple[fx.Graph, tuple[Role, ...], tuple[Role, ...]]:
    """The graph of the prefix, the roles of what it takes beside the model's inputs, and of what it returns: what is
    carried over, then the distance."""
    source, graph = canonical.gm.graph, fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    returned: list[tuple[fx.Node, Role]] = []
    for node in source.nodes:
        if node.op == "placeholder" or node.meta.get(PREFIX) or _is_size(node, env):
            env[node] = graph.node_copy(node, env.__getitem__)
            if CARRIED in node.meta:
                returned.append((env[node], Carried(node.meta[CARRIED])))
    distance = returned_by(source)[-1]
    emit = Emitter(graph, _torch.fake_mode_of([n.meta.get("val") for n in source.nodes if n.op == "placeholder"]))
    values = [hold_strides(value, emit) for value, _ in returned]
    graph.output((*values, env[distance]))
    graph.eliminate_dead_code(is_impure_node=is_impure)
    roles = drop_unread(graph, canonical.roles)
    graph.lint()
    return graph, tuple(roles.values()), (*(role for _, role in returned), canonical.kept[-1])


def suffix(graph: fx.Graph, roles: dict[str, Role]) -> dict[str, Role]:
    """Take the prefix out of the graph of a phase, which is changed; its roles, with those of what is carried."""
    roles = dict(roles)
    end = graph.output_node()
    end.args = (returned_by(graph)[:-1],)
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in [node for node in graph.nodes if CARRIED in node.meta]:
        if all(user.meta.get(PREFIX) for user in node.users):
            continue
        with graph.inserting_after(last):
            placeholder = graph.placeholder(f"carried_{node.name}")
        placeholder.meta["val"] = _dense_like(node.meta["val"])
        node.replace_all_uses_with(placeholder, lambda user: not user.meta.get(PREFIX) or is_number(user))
        roles[placeholder.name] = Carried(node.meta[CARRIED])
        last = placeholder
    graph.eliminate_dead_code(is_impure_node=is_impure)
    return roles


def _is_size(node: fx.Node, env: dict[fx.Node, fx.Node]) -> bool:
    """A number that is known where the prefix runs."""
    return is_number(node) and all(source in env for source in node.all_input_nodes)


def _dense_like(value: torch.Tensor) -> torch.Tensor:
    """What ``hold_strides`` makes of a value."""
    return torch.empty_like(value)


def hold_strides(operand: fx.Node, emit: Emitter) -> fx.Node:
    """A value as the compiler must leave it where another program reads it: dense, with the strides that it has in the
    graph."""
    value: torch.Tensor = operand.meta["val"]
    with emit.fake_mode:
        dense = torch.empty_like(value).stride()
    if value.stride() != dense:
        operand = emit(aten.clone.default, operand)
    return emit.held(operand, dense)
