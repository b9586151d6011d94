"""State inputs: the placeholders for predicates, weights and slots, behind the model's own, and what each is for."""

from __future__ import annotations

import re

import torch
from torch import fx

from ..recipe.frequency import OUTPUT_WEIGHTS
from ..recipe.vocabulary import Route
from .emit import Emitter
from .plan import CachePlan, PlannedCut, ProbePlan
from .roles import Carried, History, Invariant, Limit, Next, Output, Parameters, Predicate, ProbeSlot, Role, Weights
from .runnable import weights_dtype
from .slots import NamedSlot
from .verdict import BOUND_NUMBERS


class StateInputs:
    """The placeholders for predicates, weights and slots, behind the model's own."""

    def __init__(self, plan: CachePlan, route: Route, emit: Emitter) -> None:
        self.roles: dict[str, Role] = {}
        self.predicate: dict[str, fx.Node] = {}
        self.weights: dict[str, fx.Node] = {}
        self.history: dict[int, list[fx.Node]] = {}
        self.next: dict[int, fx.Node] = {}
        self.output: dict[str, fx.Node] = {}
        self.probe: fx.Node | None = None
        self.parameters: fx.Node | None = None
        self.bound: fx.Node | None = None
        self._emit = emit
        placeholders = emit.graph.find_nodes(op="placeholder")
        first = next(n for n in emit.graph.nodes if n.op != "placeholder")
        assert not placeholders or placeholders[-1].next is first, "placeholders come first in an ATen graph"
        with emit.graph.inserting_before(first), emit.fake_mode, torch.no_grad():
            if plan.probe is not None and route.predicts:
                self._add_probe(plan.probe, returns=plan.returns)
            for group in plan.groups if route.predicts else ():
                if self.bound is None or plan.probe is None or plan.probe.probe.group != group:
                    value = torch.empty((), dtype=torch.bool)
                    self.predicate[group] = self._add(f"predict_{group}", value, Predicate(group))
                if plan.weighted(group):
                    cut = next(c for c in plan.live_cuts if c.group == group and c.history)
                    size = plan.weight_count(group)
                    value = torch.empty(size, dtype=weights_dtype(plan, group), device=cut.device)
                    self.weights[group] = self._add(f"weights_{group}", value, Weights(group))
            if plan.output is not None and route.weighted:
                group, slot = plan.output.guidance.group, plan.output.slots[0]
                value = torch.empty(len(OUTPUT_WEIGHTS), dtype=weights_dtype(plan, group), device=slot.device)
                self.weights[group] = self._add(f"weights_{group}", value, Weights(group))
            if plan.probe is not None and route.predicts:
                group = "" if plan.probe.probe.every else plan.probe.probe.group
                self.probe = self._add("probe_kept", empty_slot(plan.probe.slot), ProbeSlot(group))
            for cut in plan.live_cuts:
                self._add_ring(cut, returns=plan.returns and route.predicts)
            for slot in () if plan.output is None else plan.output.slots:
                group = plan.output.guidance.group  # pyright: ignore[reportOptionalMemberAccess]
                self.output[slot.name] = self._add(f"output_{slot.name}", empty_slot(slot), Output(group, slot.name))

    def _add_probe(self, plan: ProbePlan, *, returns: bool) -> None:
        """Scalars first: placeholders of a kind stand together."""
        probe, device = plan.probe, plan.slot.device
        if probe.parameters:
            value = torch.empty(probe.parameters, dtype=torch.float32, device=device)
            self.parameters = self._add("probe_parameters", value, Parameters(probe.group))
        if returns:
            value = torch.empty(BOUND_NUMBERS, dtype=torch.float64, device=device)
            self.bound = self._add(f"bound_{probe.group}", value, Limit(probe.group))

    def _add_ring(self, cut: PlannedCut, *, returns: bool) -> None:
        stem = identifier(f"{cut.region}_{cut.output}")
        self.history[cut.index] = [
            self._add(f"{stem}_h{age}", empty_slot(cut), History(cut.group, cut.index, age))
            for age in range(cut.history)
        ]
        if returns or cut.sized_by_data:
            return
        if cut.history and cut.forecast.recursive:
            # A predicted step reads the slot that it writes: as one placeholder, so that the compiler knows it.
            self.next[cut.index] = self.history[cut.index][-1]
        elif cut.history:
            self.next[cut.index] = self._add(f"{stem}_next", empty_slot(cut), Next(cut.group, cut.index))

    def _add(self, name: str, value: torch.Tensor, role: Role) -> fx.Node:
        node = self._emit.placeholder(name, value)
        self.roles[node.name] = role
        return node


def empty_slot(slot: PlannedCut | NamedSlot) -> torch.Tensor:
    return torch.empty_strided(slot.shape, slot.stride, dtype=slot.slot_dtype, device=slot.device)


def role_names(roles: dict[str, Role], plan: CachePlan) -> dict[str, str]:
    """What the added placeholders are called in prints: ``history[blocks.0.attn:0][1]``, ``predict[spatial]``."""
    return {name: _role_name(role, plan) for name, role in roles.items()}


def _role_name(role: Role, plan: CachePlan) -> str:
    if isinstance(role, Predicate):
        return f"predict[{role.group}]"
    if isinstance(role, Weights):
        return f"weights[{role.group}]"
    if isinstance(role, (Output, Invariant, Carried)):
        return f"{type(role).__name__.lower()}[{role.name}]"
    if isinstance(role, (History, Next)):
        return f"history[{plan.cuts[role.cut].name}][{role.age if isinstance(role, History) else 'next'}]"
    return {ProbeSlot: "probe[kept]", Parameters: "probe[parameters]", Limit: "bound"}[type(role)]


def identifier(path: str) -> str:
    """A module path as a Python identifier: ``blocks.0.attn`` -> ``blocks_0_attn``, ``0`` -> ``_0``."""
    name = re.sub(r"\W", "_", path)
    return name if name.isidentifier() else f"_{name}"
