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
slots are placeholders behind the model's own, so the indices of the model's inputs stay right.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import _torch
from ..frequency import OUTPUT_WEIGHTS, wide_dtype
from ..methods import WHOLE, Route
from .emit import Emitter, alias_root, aten, operands_of
from .plan import CachePlan, Cut, NamedSlot, OutputPlan, cut_nodes, is_impure, output_nodes


@dataclass(frozen=True)
class Role:
    """What the host gives to a placeholder: ``kind`` is predicate, weights, history (with its age), next, output (with
    the name of what is kept of the model's output) or invariant (with the name of a value that is kept for a run).
    A value that a program returns to be kept has the role of the slot that it takes the place of; ``slot="shared"``:
    its memory is something else's too."""

    kind: str
    group: str
    cut: int = -1
    age: int = -1
    slot: str = ""


@dataclass(frozen=True)
class Canonical:
    """The canonical program of a route: the graph and the role of each added placeholder (by name, in order).

    ``kept``: what its last outputs are kept as, behind the model's own; it writes no slot of a cut then.
    """

    gm: fx.GraphModule
    roles: dict[str, Role]
    kept: tuple[Role, ...] = ()


def rewrite(gm: fx.GraphModule, plan: CachePlan, route: Route = WHOLE,
            invariants: Mapping[str, Role] | None = None) -> Canonical:  # fmt: skip
    """Build the canonical form of a route; ``gm`` is left as it is.

    Where the route allows no prediction, regions stay as they are; where it keeps nothing, no slot is written.
    ``invariants``: placeholders that ``gm`` has behind the model's own already.
    """
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {})
    graph.output(output).meta = dict(gm.graph.output_node().meta)
    result = fx.GraphModule(gm, graph)
    markers, ends = cut_nodes(graph), output_nodes(graph)
    assert len(markers) == len(plan.cuts)
    fake_mode = _torch.fake_mode_of([n.meta["val"] for n in graph.nodes if n.op == "placeholder"])
    emit = Emitter(graph, fake_mode)
    added = _Added(plan, route, emit)
    regions: dict[str, list[tuple[fx.Node, Cut]]] = {}
    writes: list[tuple[Cut, fx.Node]] = []
    for marker, cut in zip(markers, plan.cuts, strict=True):
        if cut.live and route.predicts:
            regions.setdefault(cut.region, []).append((marker, cut))
        else:
            value = drop_marker(marker, emit)
            if route.keeps and cut.history:
                writes.append((cut, value))
    barrier = {marker for group in regions.values() for marker, _ in group}
    for region, cuts in regions.items():
        writes += _make_cond(result, region, cuts, added, emit, barrier)
    if route.transform is not None:
        assert plan.output is not None
        _transform_output(graph, ends, plan.output, route, added, emit)
    for marker in ends:
        drop_marker(marker, emit)
    kept: tuple[Role, ...] = ()
    if plan.returns and route.predicts:
        kept = _return_kept(graph, writes, plan, emit)
    elif route.keeps:
        _write_slots(graph, writes, plan, added, emit)
    graph.eliminate_dead_code(is_impure_node=is_impure)
    roles = drop_unread(graph, {**(invariants or {}), **added.roles})
    graph.lint()
    result.recompile()
    return Canonical(result, roles, kept)


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


def _transform_output(graph: fx.Graph, ends: Sequence[fx.Node], plan: OutputPlan, route: Route, added: _Added,
                      emit: Emitter) -> None:  # fmt: skip
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
    value = marker.args[0]
    assert isinstance(value, fx.Node)
    with emit.graph.inserting_before(marker):
        dense = emit.dense(value, marker)
    marker.replace_all_uses_with(dense)
    emit.graph.erase_node(marker)
    return dense


class _Added:
    """The placeholders for predicates, weights and slots, behind the model's own."""

    def __init__(self, plan: CachePlan, route: Route, emit: Emitter) -> None:
        self.roles: dict[str, Role] = {}
        self.predicate: dict[str, fx.Node] = {}
        self.weights: dict[str, fx.Node] = {}
        self.history: dict[int, list[fx.Node]] = {}
        self.next: dict[int, fx.Node] = {}
        self.output: dict[str, fx.Node] = {}
        self._emit = emit
        placeholders = emit.graph.find_nodes(op="placeholder")
        first = next(n for n in emit.graph.nodes if n.op != "placeholder")
        assert not placeholders or placeholders[-1].next is first, "placeholders come first in an ATen graph"
        with emit.graph.inserting_before(first), emit.fake_mode, torch.no_grad():
            for group in plan.groups if route.predicts else ():
                self.predicate[group] = self._add(f"predict_{group}", torch.empty((), dtype=torch.bool), "predicate",
                                                  group)  # fmt: skip
                if plan.weighted(group):
                    cut = next(c for c in plan.live_cuts if c.group == group and c.history)
                    size = plan.history(group) * len(plan.weight_regions(group))
                    value = torch.empty(size, dtype=weights_dtype(plan, group), device=cut.device)
                    self.weights[group] = self._add(f"weights_{group}", value, "weights", group)
            if plan.output is not None and route.weighted:
                group, slot = plan.output.guidance.group, plan.output.slots[0]
                value = torch.empty(len(OUTPUT_WEIGHTS), dtype=weights_dtype(plan, group), device=slot.device)
                self.weights[group] = self._add(f"weights_{group}", value, "weights", group)
            for cut in plan.live_cuts:
                self._add_ring(cut, returns=plan.returns and route.predicts)
            for slot in () if plan.output is None else plan.output.slots:
                group = plan.output.guidance.group  # pyright: ignore[reportOptionalMemberAccess]
                self.output[slot.name] = self._add(f"output_{slot.name}", empty_slot(slot), "output", group,
                                                   slot=slot.name)  # fmt: skip

    def _add_ring(self, cut: Cut, *, returns: bool) -> None:
        stem = identifier(f"{cut.region}_{cut.output}")
        self.history[cut.index] = [
            self._add(f"{stem}_h{age}", empty_slot(cut), "history", cut.group, cut.index, age)
            for age in range(cut.history)
        ]
        if returns:
            return
        if cut.history and cut.forecast.recursive:
            # A predicted step reads the slot that it writes: as one placeholder, so that the compiler knows it.
            self.next[cut.index] = self.history[cut.index][-1]
        elif cut.history:
            self.next[cut.index] = self._add(f"{stem}_next", empty_slot(cut), "next", cut.group, cut.index)

    def _add(self, name: str, value: torch.Tensor, kind: str, group: str, cut: int = -1, age: int = -1,
             slot: str = "") -> fx.Node:  # fmt: skip
        node = self._emit.placeholder(name, value)
        self.roles[node.name] = Role(kind, group, cut, age, slot)
        return node


def empty_slot(slot: Cut | NamedSlot) -> torch.Tensor:
    return torch.empty_strided(slot.shape, slot.stride, dtype=slot.slot_dtype, device=slot.device)


def weights_dtype(plan: CachePlan, group: str) -> torch.dtype:
    """fp32; fp64 if a cut of the group (the model's output, for the guidance's group) is fp64."""
    dtypes = {wide_dtype(cut.dtype) for cut in plan.live_cuts if cut.group == group and cut.history}
    if plan.output is not None and group == plan.output.guidance.group:
        dtypes |= {slot.slot_dtype for slot in plan.output.slots}
    return torch.float64 if torch.float64 in dtypes else torch.float32


def role_names(roles: dict[str, Role], plan: CachePlan) -> dict[str, str]:
    """What the added placeholders are called in prints: ``history[blocks.0.attn:0][1]``, ``predict[spatial]``."""
    names = {}
    for name, role in roles.items():
        if role.kind in ("predicate", "weights"):
            names[name] = f"{'predict' if role.kind == 'predicate' else 'weights'}[{role.group}]"
        elif role.kind in ("output", "invariant"):
            names[name] = f"{role.kind}[{role.slot}]"
        else:
            age = "[next]" if role.kind == "next" else f"[{role.age}]"
            names[name] = f"history[{plan.cuts[role.cut].name}]{age}"
    return names


def identifier(path: str) -> str:
    """A module path as a Python identifier: ``blocks.0.attn`` -> ``blocks_0_attn``, ``0`` -> ``_0``."""
    name = re.sub(r"\W", "_", path)
    return name if name.isidentifier() else f"_{name}"


def _exclusive(cuts: Sequence[fx.Node], barrier: set[fx.Node]) -> list[fx.Node]:
    """The nodes that only feed the given cuts, in graph order, without the cuts themselves.

    Other live cuts stop the walk (each has a conditional of its own), as do inputs, writes and nested programs.
    A getitem whose list is made outside stays outside too: a branch takes tensors, not lists.
    """
    graph = cuts[0].graph
    cone: set[fx.Node] = set(cuts)
    for node in reversed(list(graph.nodes)):
        if node in cone or node in barrier or not node.users or node.op != "call_function" or is_impure(node):
            continue
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        if all(user in cone for user in node.users):
            cone.add(node)
    inner = [n for n in graph.nodes if n in cone and n not in cuts]
    kept = {n for n in inner if not (n.target is operator.getitem and n.args[0] not in cone)}
    return [n for n in inner if n in kept]


def _make_cond(result: fx.GraphModule, region: str, cuts: list[tuple[fx.Node, Cut]], added: _Added, emit: Emitter,
               barrier: set[fx.Node]) -> list[tuple[Cut, fx.Node]]:  # fmt: skip
    """Replace one region by a conditional; returns the values to be written to slots."""
    graph, markers = emit.graph, [marker for marker, _ in cuts]
    group = cuts[0][1].group
    cone = _exclusive(markers, barrier)
    values = [marker.args[0] for marker in markers]
    assert all(isinstance(value, fx.Node) for value in values)
    operands = list(dict.fromkeys([*operands_of(cone), *(v for v in values if v not in cone)]))  # pyright: ignore
    state = [h for _, cut in cuts for h in added.history[cut.index]]
    if any(cut.forecast.constant_weights is None for _, cut in cuts):
        state.append(added.weights[group])
    inputs = [*operands, *state]
    stem = identifier(region)
    predicted = _predict_branch(result, inputs, cuts, added, emit)
    returned = [value.meta["val"] for value in predicted.graph.output_node().args[0]]  # pyright: ignore
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
            results.append((cut, item))
    for node in [*reversed(markers), *reversed(cone)]:
        graph.erase_node(node)
    return [(cut, item) for cut, item in results if cut.history]


def _branch_inputs(graph: fx.Graph, inputs: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    env: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta["val"] = node.meta["val"]
    return env


def _compute_branch(owner: fx.GraphModule, inputs: Sequence[fx.Node], cone: Sequence[fx.Node],
                    cuts: Sequence[tuple[fx.Node, Cut]], strides: Sequence[tuple[int | torch.SymInt, ...]],
                    outer: Emitter) -> fx.GraphModule:  # fmt: skip
    """``strides`` are those of what the predict branch returns: the two must agree, down to dimensions of size 1."""
    graph = fx.Graph()
    env = _branch_inputs(graph, inputs)
    emit = Emitter(graph, outer.fake_mode)
    for node in cone:
        env[node] = graph.node_copy(node, env.__getitem__)
    values = [emit.dense(env[marker.args[0]], marker) for marker, _ in cuts]  # pyright: ignore[reportArgumentType]
    values = [emit.strided(value, s) for value, s in zip(values, strides, strict=True)]
    return _finish_branch(owner, graph, values, emit)


def _predict_branch(owner: fx.GraphModule, inputs: Sequence[fx.Node], cuts: Sequence[tuple[fx.Node, Cut]],
                    added: _Added, outer: Emitter) -> fx.GraphModule:  # fmt: skip
    graph = fx.Graph()
    env = _branch_inputs(graph, inputs)
    emit = Emitter(graph, outer.fake_mode)
    values = []
    for _, cut in cuts:
        weights = env.get(added.weights[cut.group]) if cut.group in added.weights else None
        values.append(emit.forecast(cut, [env[h] for h in added.history[cut.index]], weights, graph))
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
    return fx.GraphModule(owner, graph)


def _write_slots(graph: fx.Graph, writes: Sequence[tuple[Cut, fx.Node]], plan: CachePlan, added: _Added,
                 emit: Emitter) -> None:  # fmt: skip
    with graph.inserting_before(graph.output_node()):
        for cut, value in writes:
            kept = _conditional_half(cut, value, plan.output, emit) if plan.output is not None else value
            emit(aten.copy_.default, added.next[cut.index], emit.to(kept, cut.slot_dtype))


def _return_kept(graph: fx.Graph, writes: Sequence[tuple[Cut, fx.Node]], plan: CachePlan,
                 emit: Emitter) -> tuple[Role, ...]:  # fmt: skip
    """Return the values to be kept, with the strides of their slots. What is not in memory of its own has a role that
    says so: it must be copied."""
    end = graph.output_node()
    outputs: list[Any] = list(end.args[0])  # pyright: ignore[reportArgumentType]
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
            outputs.append(emit.held(kept, cut.stride))
            roles.append(Role("next", cut.group, cut.index, slot="shared" if shared else ""))
    end.args = (tuple(outputs),)
    return tuple(roles)


def _conditional_half(cut: Cut, value: fx.Node, output: OutputPlan, emit: Emitter) -> fx.Node:
    """What a slot for the conditional half keeps of a value: all of it, or its half where it holds both."""
    shape = tuple(value.meta["val"].shape)
    if not output.halved or shape == cut.shape:
        return value
    doubled = halved_dimension(shape, cut.shape)
    assert doubled is not None, cut.name
    size = cut.shape[doubled]
    start = size if output.latents.unconditional_first else 0
    return emit(aten.slice.Tensor, value, doubled, start, start + size)


def halved_dimension(full: Sequence[int | torch.SymInt], half: Sequence[int | torch.SymInt]) -> int | None:
    """The one dimension in which ``full`` is twice ``half``; None if they do not differ so."""
    if len(full) != len(half):
        return None
    differing = [d for d, (a, b) in enumerate(zip(full, half, strict=True)) if a != b]
    return differing[0] if len(differing) == 1 and full[differing[0]] == 2 * half[differing[0]] else None
