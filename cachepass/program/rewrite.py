"""Rewrite: every region with a live cut becomes a conditional. The result is the canonical form of the program.

    rewrite : ATen GraphModule with markers, CachePlan -> Canonical

        q = mm(x, wq); ... ; attn = mm(s, wo)           cond = torch.cond(predict_g,
        cut = cachepass.cut(attn, "blocks.0.attn", 0)             predict_blocks_0_attn,   # weights * history
        y = x + cut                                ->             compute_blocks_0_attn,   # q = ...; attn
                                                                  (x, wq, ..., weights_g, h0, h1))
                                                        y = x + cond[0]
                                                        copy_(next, cond[0])

The compute branch holds the nodes that only feed the region's cuts. Both branches are pure; the value is written to
the ring's next slot after the branch, and the host commits the step by rotating the ring. Predicates, weights and
slots are placeholders behind the model's own, so the indices of the model's inputs stay right. Of a residual cut the
difference to its base is kept, and a prediction is the base and the forecast.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from .. import _torch
from ..capture.half import halved_dimension
from ..capture.markers import base_of, cut_nodes, output_nodes
from ..capture.nodes import copied, operand, returned_by
from ..recipe.vocabulary import WHOLE, Route
from .branches import make_cond
from .emit import EMITTED, Emitter, alias_root, aten
from .liveness import is_impure
from .plan import CachePlan, OutputPlan, PlannedCut
from .probe import Decision, look, tag_prefix
from .roles import Distance, Next, ProbeSlot, Role, Verdict
from .state_inputs import StateInputs


@dataclass(frozen=True)
class Canonical:
    """The canonical program of a route: the graph and the role of each added placeholder (by name, in order).

    ``kept``: what its last outputs are, behind the model's own: what is kept, where it writes no slot, and what a
    decision says. ``predicates``: names of the nodes that say whether a group is predicted.
    """

    gm: fx.GraphModule
    roles: dict[str, Role]
    kept: tuple[Role, ...] = ()
    predicates: dict[str, str] = field(default_factory=dict)


def rewrite(
    gm: fx.GraphModule, plan: CachePlan, route: Route = WHOLE, invariants: Mapping[str, Role] | None = None
) -> Canonical:
    """Build the canonical form of a route; ``gm`` is left as it is.

    Where the route allows no prediction, regions stay as they are; where it keeps nothing, no slot is written.
    ``invariants``: placeholders that ``gm`` has behind the model's own already.
    """
    graph = copied(gm.graph)
    result = _torch.graph_module(gm, graph)
    markers, ends = cut_nodes(graph), output_nodes(graph)
    assert len(markers) == len(plan.cuts)
    fake_mode = _torch.fake_mode_of([n.meta["val"] for n in graph.nodes if n.op == "placeholder"])
    emit = Emitter(graph, fake_mode)
    added = StateInputs(plan, route, emit)
    regions: dict[str, list[tuple[fx.Node, PlannedCut]]] = {}
    writes: list[tuple[PlannedCut, fx.Node]] = []
    decision = look(graph, plan, added, emit) if plan.probe is not None else None
    for marker, cut in zip(markers, plan.cuts, strict=True):
        if cut.live and route.predicts:
            regions.setdefault(cut.region, []).append((marker, cut))
        else:
            base = base_of(marker)
            value = drop_marker(marker, emit)
            if route.keeps and cut.history:
                with graph.inserting_before(last_reads(graph)):
                    writes.append((cut, emit.residual(value, base)))
    barrier = {marker for group in regions.values() for marker, _ in group}
    for region, cuts in regions.items():
        writes += make_cond(result, region, cuts, added, emit, barrier)
    if route.transform is not None:
        assert plan.output is not None
        _transform_output(graph, ends, plan.output, route, added, emit)
    for marker in ends:
        drop_marker(marker, emit)
    returned = [(cut, value) for cut, value in writes if cut.sized_by_data or (plan.returns and route.predicts)]
    kept = _return_kept(graph, returned, plan, emit)
    if route.keeps:
        _write_slots(graph, [write for write in writes if write not in returned], plan, added, emit)
    if decision is not None:
        kept = (*kept, *_keep_probe(graph, decision, added, emit, returns=plan.returns))
    graph.eliminate_dead_code(is_impure_node=is_impure)
    roles = drop_unread(graph, {**(invariants or {}), **added.roles})
    if decision is not None and not plan.returns:
        tag_prefix(graph, decision.told)
    graph.lint()
    result.recompile()
    predicates = {node.name: group for group, node in added.predicate.items()}
    return Canonical(result, roles, kept, predicates)


def _keep_probe(
    graph: fx.Graph, decision: Decision, added: StateInputs, emit: Emitter, *, returns: bool
) -> tuple[Role, ...]:
    """Keep the value that was looked at for the next step, and return what the host learns of the decision."""
    end = graph.output_node()
    assert added.probe is not None
    role = added.roles[added.probe.name]
    outputs = list(returned_by(graph))
    told = Verdict(role.group) if returns else Distance(role.group)
    with graph.inserting_before(last_reads(graph)):
        if returns:
            value, root = decision.value, alias_root(decision.value)
            # A tensor that is another output or an input too would be overwritten by its owner: the host copies it.
            # An input that the program itself writes is copied here, before it does.
            written = any(_is_write_to_input(user) and user.args[0] is root for user in root.users)
            end.args = ((*outputs, emit(aten.clone.default, value) if written else value, decision.told),)
            return ProbeSlot(role.group), told
        emit(aten.copy_.default, added.probe, decision.value)
    end.args = ((*outputs, decision.told),)
    return (told,)


def last_reads(graph: fx.Graph) -> fx.Node:
    """The node in front of which every input is still what the model was given: AOTAutograd writes those that the model
    writes in place at the graph's end."""
    return next(node for node in graph.nodes if node.op == "output" or _is_write_to_input(node))


def _is_write_to_input(node: fx.Node) -> bool:
    """What the model writes, not what is kept."""
    return node.target is aten.copy_.default and not node.name.startswith(EMITTED)


def drop_unread(graph: fx.Graph, roles: dict[str, Role]) -> dict[str, Role]:
    """Erase the added placeholders that nothing reads; what remains, in order."""
    kept = {}
    for node in graph.find_nodes(op="placeholder"):
        if node.name in roles:
            if node.users:
                kept[node.name] = roles[node.name]
            else:
                graph.erase_node(node)
    return kept


def _transform_output(
    graph: fx.Graph, ends: Sequence[fx.Node], plan: OutputPlan, route: Route, added: StateInputs, emit: Emitter
) -> None:
    """What the route does with the model's output, traced into the graph in front of the graph's end."""
    assert route.transform is not None
    state = [added.output[name] for name in route.reads]
    if route.weighted:
        state.append(added.weights[plan.guidance.group])
    function = functools.partial(route.transform, plan.latents)
    end = graph.output_node()
    with graph.inserting_before(end):
        values, *kept = emit.traced(function, list(ends), *state)
        for name, value in zip(route.writes, kept, strict=True):
            emit(aten.copy_.default, added.output[name], value)
    replaced = dict(zip(ends, values, strict=True))
    end.args = (fx.map_arg(end.args[0], lambda node: replaced.get(node, node)),)


def drop_marker(marker: fx.Node, emit: Emitter) -> fx.Node:
    """Put the value, with the marker's strides, in the marker's place."""
    value = operand(marker)
    with emit.graph.inserting_before(marker):
        dense = emit.dense(value, marker)
    marker.replace_all_uses_with(dense)
    emit.graph.erase_node(marker)
    return dense


def _write_slots(
    graph: fx.Graph, writes: Sequence[tuple[PlannedCut, fx.Node]], plan: CachePlan, added: StateInputs, emit: Emitter
) -> None:
    with graph.inserting_before(last_reads(graph)):
        for cut, value in writes:
            kept = _conditional_half(cut, value, plan.output, emit) if plan.output is not None else value
            emit(aten.copy_.default, added.next[cut.index], emit.to(kept, cut.slot_dtype))


def _return_kept(
    graph: fx.Graph, writes: Sequence[tuple[PlannedCut, fx.Node]], plan: CachePlan, emit: Emitter
) -> tuple[Role, ...]:
    """Return the values to be kept, with the strides of their slots. What is not in memory of its own has a role that
    says so: it must be copied."""
    end = graph.output_node()
    outputs = list(returned_by(graph))
    taken = {alias_root(value) for value in outputs if isinstance(value, fx.Node)}
    roles = []
    with graph.inserting_before(end):
        for cut, value in writes:
            kept = _conditional_half(cut, value, plan.output, emit) if plan.output is not None else value
            kept = emit.to(kept, cut.slot_dtype)
            root = alias_root(kept)
            # A clone in the graph is no help: Inductor removes it, as one that changes no value.
            shared = root in taken or root.op == "placeholder" or root.meta["val"].shape != kept.meta["val"].shape
            taken.add(root)
            outputs.append(kept if cut.sized_by_data else emit.held(kept, cut.stride))
            roles.append(Next(cut.group, cut.index, shared))
    end.args = (tuple(outputs),)
    return tuple(roles)


def _conditional_half(cut: PlannedCut, value: fx.Node, output: OutputPlan, emit: Emitter) -> fx.Node:
    """What a slot for the conditional half keeps of a value: all of it, or its half where it holds both."""
    shape = tuple(value.meta["val"].shape)
    if not output.halved or shape == cut.shape:
        return value
    doubled = halved_dimension(shape, cut.shape)
    assert doubled is not None, cut.name
    size = cut.shape[doubled]
    start = size if output.latents.unconditional_first else 0
    return emit(aten.slice.Tensor, value, doubled, start, start + size)
