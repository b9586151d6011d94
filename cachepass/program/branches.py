"""Branches: one region becomes a conditional, with a branch that computes it and one that forecasts it."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from .. import _torch
from ..capture.markers import base_of
from ..capture.nodes import operand, returned_by
from .emit import Emitter, alias_root, aten, operands_of
from .liveness import is_impure
from .plan import PlannedCut
from .state_inputs import StateInputs, identifier


def _exclusive(cuts: Sequence[fx.Node], barrier: set[fx.Node]) -> list[fx.Node]:
    """The nodes that only feed the given cuts, in graph order, without the cuts themselves.

    Other live cuts stop the walk (each has a conditional of its own), as do inputs, writes and nested programs.
    A getitem whose list is made outside stays outside too: a branch takes tensors, not lists. So does the wait for a
    collective that begins outside.
    """
    cone: set[fx.Node] = set(cuts)
    stop = barrier.union(base for cut in cuts if (base := base_of(cut)) is not None)  # a base is read in either branch
    readers: Counter[fx.Node] = Counter()  # in the cone, of each node
    pending = list(cuts)
    while pending:
        for source in pending.pop().all_input_nodes:
            readers[source] += 1
            read_elsewhere = readers[source] < len(source.users)
            if not read_elsewhere and source not in cone and source not in stop and _may_branch(source):
                cone.add(source)
                pending.append(source)
    inner = sorted(cone - set(cuts))
    kept: dict[fx.Node, None] = {}
    for node in inner:
        is_part = node.target is operator.getitem or _torch.is_wait(node)
        if not is_part or node.args[0] in kept:
            kept[node] = None
    return list(kept)


def _may_branch(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and not is_impure(node)
        and not isinstance(node.target, torch._ops.HigherOrderOperator)
    )


def make_cond(
    result: fx.GraphModule,
    region: str,
    cuts: list[tuple[fx.Node, PlannedCut]],
    added: StateInputs,
    emit: Emitter,
    barrier: set[fx.Node],
) -> list[tuple[PlannedCut, fx.Node]]:
    """Replace one region by a conditional; returns the values to be written to slots."""
    graph, markers = emit.graph, [marker for marker, _ in cuts]
    group = cuts[0][1].group
    cone = _exclusive(markers, barrier)
    values = [operand(marker) for marker in markers]
    bases = {cut.index: base_of(marker) for marker, cut in cuts}
    given = [*(v for v in values if v not in cone), *(base for base in bases.values() if base is not None)]
    operands = list(dict.fromkeys([*operands_of(cone), *given]))
    state = [h for _, cut in cuts for h in added.history[cut.index]]
    if any(cut.forecast.constant_weights is None for _, cut in cuts):
        state.append(added.weights[group])
    inputs = [*operands, *state]
    stem = identifier(region)
    predicted = _predict_branch(result, inputs, cuts, bases, added, emit)
    returned = [value.meta["val"] for value in returned_by(predicted.graph)]
    strides = [tuple(value.stride()) for value in returned]
    result.add_submodule(f"predict_{stem}", predicted)
    result.add_submodule(f"compute_{stem}", _compute_branch(result, inputs, cone, cuts, strides, emit))
    last = max(markers)
    with graph.inserting_after(last):
        predict, compute = graph.get_attr(f"predict_{stem}"), graph.get_attr(f"compute_{stem}")
    with graph.inserting_before(last.next.next.next):
        cond = graph.call_function(_torch.COND, (added.predicate[group], predict, compute, tuple(inputs)))
        cond.meta["val"] = tuple(returned)
        results = []
        for i, (marker, cut) in enumerate(cuts):
            item = graph.call_function(operator.getitem, (cond, i))
            item.meta["val"] = returned[i]
            marker.replace_all_uses_with(item)
            results.append((cut, item, bases[cut.index]))
        kept = [(cut, emit.residual(item, base)) for cut, item, base in results if cut.history]
    for node in [*reversed(markers), *reversed(cone)]:
        graph.erase_node(node)
    return kept


def _branch_inputs(graph: fx.Graph, inputs: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    env: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta["val"] = node.meta["val"]
    return env


def _compute_branch(
    owner: fx.GraphModule,
    inputs: Sequence[fx.Node],
    cone: Sequence[fx.Node],
    cuts: Sequence[tuple[fx.Node, PlannedCut]],
    strides: Sequence[tuple[int | torch.SymInt, ...]],
    outer: Emitter,
) -> fx.GraphModule:
    """``strides`` are those of what the predict branch returns: the two must agree, down to dimensions of size 1."""
    graph = fx.Graph()
    env = _branch_inputs(graph, inputs)
    emit = Emitter(graph, outer.fake_mode)
    for node in cone:
        env[node] = graph.node_copy(node, env.__getitem__)
    values = [emit.dense(env[operand(marker)], marker) for marker, _ in cuts]
    values = [emit.strided(value, s) for value, s in zip(values, strides, strict=True)]
    return _finish_branch(owner, graph, values, emit)


def _predict_branch(
    owner: fx.GraphModule,
    inputs: Sequence[fx.Node],
    cuts: Sequence[tuple[fx.Node, PlannedCut]],
    bases: Mapping[int, fx.Node | None],
    added: StateInputs,
    outer: Emitter,
) -> fx.GraphModule:
    graph = fx.Graph()
    env = _branch_inputs(graph, inputs)
    emit = Emitter(graph, outer.fake_mode)
    values = []
    for marker, cut in cuts:
        weights = env.get(added.weights[cut.group]) if cut.group in added.weights else None
        value = emit.forecast(cut, [env[h] for h in added.history[cut.index]], weights)
        base = bases[cut.index]
        if base is not None:
            value = emit.restrided(emit(aten.add.Tensor, env[base], value), marker.meta["val"].stride())
        values.append(value)
    return _finish_branch(owner, graph, values, emit)


def _finish_branch(owner: fx.GraphModule, graph: fx.Graph, values: list[fx.Node], emit: Emitter) -> fx.GraphModule:
    """Return the values; clone what would alias an operand or another value, which conditionals do not allow."""
    roots: set[fx.Node] = set()
    returned = []
    for value in values:
        root = alias_root(value)
        returned.append(emit.clone(value) if root.op == "placeholder" or root in roots else value)
        roots.add(root)
    graph.output(tuple(returned))
    graph.lint()
    return _torch.graph_module(owner, graph)
