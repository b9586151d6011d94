"""Specialize: partial evaluation of the canonical form for one phase.

    specialize : Canonical of the phase's route, CachePlan, phase -> Variant

The phase says which predicates are true. Each conditional is replaced by its taken branch, writes of predicted groups
go, and so does everything that only fed what is gone - norms and projections before a skipped attention included -
together with the placeholders that nobody reads any more. What remains is a straight line.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from .. import _torch
from ..capture.nodes import operand, returned_by
from .emit import Emitter, alias_root, aten
from .liveness import is_impure
from .narrow import narrow
from .phases import Phase, phase_name
from .plan import CachePlan
from .rejoin import rejoin
from .rewrite import Canonical, drop_unread
from .roles import Next, Role
from .split import hold_strides, prefix, suffix


@dataclass(frozen=True)
class Variant:
    """The program of one phase (or, for the cond lowering, of all of them).

    ``inputs`` are the roles of the placeholders behind the model's own, in order; ``kept`` is what its outputs behind
    the model's own are kept as. ``repeated``: it runs in many steps.
    """

    name: str
    gm: fx.GraphModule
    inputs: tuple[Role, ...]
    repeated: bool = True
    kept: tuple[Role, ...] = ()


def specialize(canonical: Canonical, plan: CachePlan, phase: Phase) -> Variant:
    """The straight-line program in which exactly the groups of ``phase`` are predicted."""
    graph, kept = _evaluate(canonical, plan, phase)
    return _finish(canonical, phase_name(phase, plan.groups), graph, canonical.roles, kept)


def specialize_rest(canonical: Canonical, plan: CachePlan, phase: Phase) -> Variant:
    """The same, without what runs before the host decides on the phase (``program/split.py``)."""
    graph, kept = _evaluate(canonical, plan, phase)
    roles = suffix(graph, canonical.roles)
    return _finish(canonical, phase_name(phase, plan.groups), graph, roles, kept[:-1])


def up_to_decision(canonical: Canonical, name: str) -> Variant:
    """The program that runs before the host decides."""
    graph, roles, returned = prefix(canonical)
    rejoin(graph)
    narrow(graph)
    return Variant(name, _torch.graph_module(canonical.gm, graph), roles, kept=returned)


def _finish(
    canonical: Canonical, name: str, graph: fx.Graph, roles: dict[str, Role], kept: tuple[Role, ...]
) -> Variant:
    rejoin(graph)
    narrow(graph)
    read = drop_unread(graph, roles)
    graph.lint()
    return Variant(name, _torch.graph_module(canonical.gm, graph), tuple(read.values()), kept=kept)


def _evaluate(canonical: Canonical, plan: CachePlan, phase: Phase) -> tuple[fx.Graph, tuple[Role, ...]]:
    """Fold the predicates, and drop what would be kept of groups whose predictions are not; what its last outputs are
    kept as."""
    predicted = set(phase.predicted)
    silent = {group for group in phase.predicted if not plan.recursive(group)}
    source, graph = canonical.gm, fx.Graph()
    env: dict[fx.Node, object] = {}
    for node in source.graph.nodes:
        if node.op == "call_function" and node.target is _torch.COND:
            env[node] = _inline(source, node, graph, env, canonical.predicates, predicted)
        elif node.target is operator.getitem and isinstance(env.get(node.args[0]), tuple):
            env[node] = env[node.args[0]][node.args[1]]  # pyright: ignore
        elif _is_write_of(node, canonical.roles, silent) or _is_branch(node):
            continue
        else:
            env[node] = graph.node_copy(node, lambda n: env[n])  # pyright: ignore
    fake_mode = _torch.fake_mode_of([n.meta.get("val") for n in graph.nodes if n.op == "placeholder"])
    kept = _drop_returned(graph, canonical.kept, silent)
    _own_outputs(graph, canonical.roles, Emitter(graph, fake_mode), kept=len(kept))
    graph.eliminate_dead_code(is_impure_node=is_impure)
    return graph, kept


def _drop_returned(graph: fx.Graph, kept: Sequence[Role], silent: set[str]) -> tuple[Role, ...]:
    """Return nothing to be kept of some groups; what the last outputs are then."""
    output = graph.output_node()
    returned = returned_by(graph)
    own = len(returned) - len(kept)
    left = [i for i, role in enumerate(kept) if not isinstance(role, Next) or role.group not in silent]
    output.args = ((*returned[:own], *(returned[own + i] for i in left)),)
    return tuple(kept[i] for i in left)


def all_phases(canonical: Canonical, name: str) -> Variant:
    """The canonical form of a route itself as one program (``lowering="cond"``).

    Branches are compiled for the strides that their operands have in the graph, while Inductor may choose others for
    a value that it computes; so each computed operand is held to its strides (no copy where they agree), and one with
    gaps between its elements, which Inductor would close, is made dense first.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    held: dict[fx.Node, fx.Node] = {}
    emit = Emitter(graph, _torch.fake_mode_of([n.meta.get("val") for n in canonical.gm.graph.nodes]))
    for node in canonical.gm.graph.nodes:
        if node.op == "call_function" and node.target is _torch.COND:
            for operand in node.args[3]:
                is_tensor = isinstance(operand.meta.get("val"), torch.Tensor)
                if operand not in held and operand.op != "placeholder" and is_tensor:
                    held[operand] = hold_strides(env[operand], emit)
            env[node] = graph.node_copy(node, lambda n: held.get(n, env[n]))
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
    _own_outputs(graph, canonical.roles, emit, kept=len(canonical.kept))
    graph.lint()
    roles = tuple(canonical.roles.values())
    return Variant(name, _torch.graph_module(canonical.gm, graph), roles, kept=canonical.kept)


def _inline(
    source: fx.GraphModule,
    cond: fx.Node,
    graph: fx.Graph,
    env: dict[fx.Node, object],
    predicates: dict[str, str],
    predicted: set[str],
) -> tuple[object, ...]:
    """Copy the taken branch in place of the conditional; returns what stands for its results."""
    predicate, predict, compute, operands = cond.args
    assert isinstance(predicate, fx.Node) and isinstance(operands, tuple)
    taken = predict if predicates[predicate.name] in predicted else compute
    assert isinstance(taken, fx.Node) and isinstance(taken.target, str)
    branch = source.get_submodule(taken.target)
    assert isinstance(branch, fx.GraphModule)
    inner: dict[fx.Node, object] = {}
    inputs = iter(operands)
    for node in branch.graph.nodes:
        if node.op == "placeholder":
            operand = next(inputs)
            inner[node] = env[operand] if isinstance(operand, fx.Node) else operand
        elif node.op == "output":
            return tuple(inner[value] for value in node.args[0])
        elif node.meta.get("cachepass_unalias"):
            inner[node] = inner[node.args[0]]  # made for the conditional alone
        else:
            inner[node] = graph.node_copy(node, lambda n: inner[n])  # pyright: ignore
    raise AssertionError("a branch ends with its output")


def _is_write_of(node: fx.Node, roles: dict[str, Role], groups: set[str]) -> bool:
    if node.target is not aten.copy_.default:
        return False
    role = roles.get(operand(node).name)
    return role is not None and role.group in groups


def _is_branch(node: fx.Node) -> bool:
    """The get_attr of a branch: its users are conditionals, which are gone."""
    return node.op == "get_attr" and bool(node.users) and all(u.target is _torch.COND for u in node.users)


def _own_outputs(graph: fx.Graph, roles: dict[str, Role], emit: Emitter, kept: int = 0) -> None:
    """An output that is a slot's memory is copied: the caller keeps it, and may write to it. The last ``kept`` outputs
    go to the host, which copies them itself.

    Outputs that share a slot share the copy, as they share memory in the model.
    """
    output = graph.output_node()
    returned = returned_by(graph)
    count = len(returned) - kept
    copies: dict[fx.Node, fx.Node] = {}

    def own(value: fx.Node) -> fx.Node:
        """The value as a view of the slot's copy."""
        if value not in copies:
            if value.op == "placeholder":
                copies[value] = emit(aten.clone.default, value)
            else:
                copies[value] = graph.node_copy(value, lambda node: own(node) if _is_of_slot(node, roles) else node)
        return copies[value]

    slots = [alias_root(value) for value in returned[:count] if _is_of_slot(value, roles)]
    with graph.inserting_before(output):
        owned = []
        for value in returned[:count]:
            if not _is_of_slot(value, roles):
                owned.append(value)
            elif slots.count(alias_root(value)) == 1:  # of a slot that is read in part, no more is copied
                owned.append(emit(aten.clone.default, value))
            else:
                owned.append(own(value))
        output.args = ((*owned, *returned[count:]),)


def _is_of_slot(value: object, roles: dict[str, Role]) -> bool:
    """A tensor that lies in memory which is kept."""
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), (torch.Tensor, tuple, list)):
        return False
    return alias_root(value).name in roles
