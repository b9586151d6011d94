"""A program: everything that was made of one ATen graph, and how a call of it runs.

Variants are compiled when a step first needs them and then kept. The program knows no schedule: it is told which
groups are predicted, with which weights, on which state.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .. import _torch
from ..errors import warn
from ..graph.dump import dump
from ..graph.flops import count_flops
from ..graph.hoist import Hoisted
from ..graph.plan import CachePlan, Phase
from ..graph.probe import BOUND_NUMBERS, quotient
from ..graph.rewrite import Canonical, rewrite
from ..graph.sizes import SymbolBinder
from ..graph.specialize import Variant, all_phases, specialize, specialize_rest, up_to_decision
from ..graph.state_inputs import Role, role_names, weights_dtype
from ..lower import LoweredVariant, lower
from ..methods import WHOLE, Route
from .invariants import InvariantState
from .state import OutputState, RunState

logger = logging.getLogger(__name__)
_RESTLESS = 3  # computed anew so often in a row, within a run: worth a warning
_TRUE_FALSE = (torch.tensor(False), torch.tensor(True))


@dataclass(frozen=True)
class Pending:
    """A decision that waits for the probe's distance.

    Attributes:
        group: Whether it is predicted.
        decide: Distance -> predict?
        weights: Of its forecast, if it is.
        bound: The decision as numbers, for a program that takes it by itself.
    """

    group: str
    decide: Callable[[float], bool]
    weights: Callable[[], tuple[float, ...]]
    bound: tuple[float, ...]


@dataclass
class StepCall:
    """One call of a program: its phase, the state it runs on, and weights.

    ``computed`` are the groups whose outputs are kept. ``output`` is what is kept for guidance, ``partner`` that of the
    other call of a two-call guidance step; both are None where there is none. ``difference``: whether this call writes
    the difference of the two branches (True) or uses it (False); None: neither. ``invariants`` is what is kept for the
    run ``epoch``. ``pending``: of one group it is not known yet whether it is predicted; ``settle`` says so.
    ``parameters`` are those of the probe, ``distance`` is what it measured.
    """

    program: Program
    phase: Phase
    state: RunState | None = None  # None: nothing is kept, nothing is predicted
    computed: tuple[str, ...] = ()
    weights: dict[str, tuple[float, ...]] = field(default_factory=dict)
    output: OutputState | None = None
    partner: OutputState | None = None
    difference: bool | None = None
    invariants: InvariantState | None = None
    epoch: int = 0
    pending: Pending | None = None
    parameters: tuple[float, ...] = ()
    distance: float | None = None

    def settle(self, *, predict: bool, distance: float | None) -> None:
        """The pending decision is taken."""
        pending = self.pending
        assert pending is not None
        self.pending, self.distance = None, distance
        if not predict:
            self.computed = (*self.computed, pending.group)
            return
        chosen = {*self.phase.predicted, pending.group}
        self.phase = Phase(tuple(g for g in self.program.plan.groups if g in chosen), self.phase.route)
        if self.program.plan.weighted(pending.group) and pending.group not in self.weights:
            self.weights[pending.group] = pending.weights()

    def output_slot(self, name: str) -> torch.Tensor:
        """A slot for what is kept of the model's output: the partner's, if it wrote one of this name."""
        holder = self.partner if self.partner is not None and name in self.partner.slots else self.output
        assert holder is not None
        return holder.slot(name)


@dataclass(frozen=True, eq=False)
class Traced:
    """An ATen graph with markers, AOTAutograd's example inputs, the context to compile it in, and input names.

    ``varying`` are the inputs (by index) that change from step to step, ``declared`` those that the user said do not;
    of the others it is checked. ``parameters`` are the model's own. ``hoisted`` is what was taken out of the graph, to
    be computed once per run.
    """

    gm: fx.GraphModule
    inputs: tuple[Any, ...]
    context: _torch.SavedContext
    names: dict[str, str]
    varying: frozenset[int] = frozenset()
    declared: frozenset[int] = frozenset()
    parameters: frozenset[int] = frozenset()
    hoisted: Hoisted | None = None


class Program:
    """The variants of one model: of its graph and, where steps may skip half of the batch, of its half-batch graph."""

    def __init__(self, full: Traced, half: Traced | None, plan: CachePlan, lowering: str) -> None:
        self.full, self.half, self.plan, self.lowering = full, half, plan, lowering
        self.on_cuda = any(isinstance(value, torch.Tensor) and value.is_cuda for value in full.inputs)
        self.variants: dict[str, LoweredVariant] = {}
        self.warnings: list[str] = []
        self._restless: set[str] = set()  # inputs that were warned of
        self._canonical: dict[Route, Canonical] = {}
        self._flops: dict[Phase, int | None] = {}
        self._by_phase: dict[tuple[Route, tuple[str, ...]], LoweredVariant] = {}
        self._weights: dict[tuple[object, ...], torch.Tensor] = {}
        devices = {cut.group: cut.device for cut in plan.live_cuts if cut.history}
        self._weights_at = {g: (weights_dtype(plan, g), devices[g]) for g in plan.groups if plan.weighted(g)}
        if plan.output is not None:
            group = plan.output.guidance.group
            self._weights_at[group] = weights_dtype(plan, group), plan.output.slots[0].device
        self._once: dict[Traced, tuple[LoweredVariant, SymbolBinder]] = {}
        self._lock = threading.RLock()

    def flops(self, phase: Phase) -> int | None:
        """Of one call in a phase; None: unknown."""
        if phase not in self._flops:
            self._flops[phase] = count_flops(self.specialized(phase).gm.graph)
        return self._flops[phase]

    def flops_once(self, route: Route = WHOLE) -> int | None:
        """Of what is computed once per run."""
        hoisted = self.traced(route).hoisted
        return 0 if hoisted is None else count_flops(hoisted.once.graph)

    @property
    def computed_once(self) -> list[str]:
        """Paths of the modules that would be cut, and are computed once per run."""
        regions = () if self.full.hoisted is None else self.full.hoisted.regions
        return [region.split("@")[0] for region in regions]

    def run(self, inputs: list[Any], call: StepCall) -> Any:
        """Run the variant of the call's phase on the model's inputs (flat, as AOTAutograd gives them)."""
        carried = self._decide(inputs, call) if self.splits(call.phase.route) else {}
        phase = call.phase
        variant = self._by_phase.get((phase.route, phase.predicted)) or self.compile(phase)
        if call.state is not None:
            call.state.begin(call.computed, phase.predicted, writes=not (variant.kept and self.plan.returns))
        if call.output is not None and call.difference:
            call.output.begin()
        self._add_state(inputs, variant, call)
        inputs.extend(carried[role.slot] for role in variant.carried)
        carried.clear()
        results = variant.run(inputs)
        if not variant.kept:
            return results
        own = len(results) - len(variant.kept)
        self._take(variant.kept, results[own:], call)
        return results[:own]

    def _add_state(self, inputs: list[Any], variant: LoweredVariant, call: StepCall) -> None:
        """Everything that a variant takes behind the model's inputs, but what is carried."""
        if variant.invariants:
            self._add_invariants(inputs, variant, call)
        for role in variant.scalars:
            if role.kind == "predicate":
                inputs.append(_TRUE_FALSE[role.group in call.phase.predicted])
            elif role.kind == "weights":
                inputs.append(self._weights_tensor(role.group, call.weights.get(role.group)))
            else:
                inputs.append(self._numbers(role, call))
        for _ in variant.probes:
            assert call.state is not None, "a variant with a probe runs on a state"
            inputs.append(call.state.probe_slot())
        if variant.slots:
            assert call.state is not None, "a variant with slots runs on a state"
            inputs.extend(call.state.slot_list(variant.slots))
        for role in variant.outputs:
            inputs.append(call.output_slot(role.slot))

    # ---- decisions --------------------------------------------------------------------------------------------------

    def splits(self, route: Route) -> bool:
        """The host decides in the middle of a call on this route."""
        return self.plan.probe is not None and not self.plan.returns and route.predicts

    def _decide(self, inputs: Sequence[Any], call: StepCall) -> dict[str, torch.Tensor]:
        """Run up to the decision, and take it if it is pending: one number comes from the device. What is carried."""
        variant = self.compile_decision(call.phase.route)
        own = [*inputs]
        self._add_state(own, variant, call)
        *values, told = variant.run(own)
        if call.pending is not None:
            distance = self._distance(told)
            call.settle(predict=call.pending.decide(distance), distance=distance)
        return {role.slot: value for role, value in zip(variant.kept, values, strict=False)}

    def _distance(self, told: torch.Tensor) -> float:
        group = self.plan.process_group
        if group is None:
            return float(told)
        total = told.clone()  # a CUDA graph's output stays as it is
        torch.distributed.all_reduce(total, group=group)
        return float(quotient(total.cpu()))

    def compile_decision(self, route: Route) -> LoweredVariant:
        """The program up to the decision of a route, compiled once."""
        name = "/".join(part for part in (route.name, "decide") if part)
        with self._lock:
            if name not in self.variants:
                self._lower(up_to_decision(self.canonical(route), name), self.traced(route))
            return self.variants[name]

    def _take(self, roles: Sequence[Role], values: Sequence[Any], call: StepCall) -> None:
        """What a program returned beside the model's outputs: values to keep, and the decision that it took."""
        state = call.state
        assert state is not None
        if roles[-1].kind == "verdict":
            *values, told = values
            roles = roles[:-1]
            if call.pending is not None:
                predict, distance = told.tolist()
                call.settle(predict=predict > 0.5, distance=distance)
        kept = [(role, value) for role, value in zip(roles, values, strict=True)
                if role.group not in call.phase.predicted or self.plan.recursive(role.group)]  # fmt: skip
        state.receive(*zip(*kept, strict=True)) if kept else None

    def _numbers(self, role: Role, call: StepCall) -> torch.Tensor:
        """The probe's parameters, or the bound of a decision."""
        probe = self.plan.probe
        assert probe is not None
        if role.kind == "parameters":
            return self._device_tensor(role.kind, call.parameters, torch.float32, probe.slot.device)
        forced = (1.0 if role.group in call.phase.predicted else -1.0, *(0.0,) * (BOUND_NUMBERS - 1))
        bound = forced if call.pending is None else call.pending.bound
        return self._device_tensor(role.kind, bound, torch.float64, probe.slot.device)

    def _add_invariants(self, inputs: list[Any], variant: LoweredVariant, call: StepCall) -> None:
        """What is kept for the run, computed first if it does not hold for these inputs."""
        route = call.phase.route
        traced = self.traced(route)
        assert traced.hoisted is not None
        state = call.invariants or InvariantState(traced.hoisted, traced.declared)
        self.compile_once(route)
        once, binder = self._once[traced]
        state.refresh(inputs, call.epoch, binder, once.run)
        if state.changes == _RESTLESS and state.changed is not None:
            self._warn_restless(traced, state.changed)
        inputs.extend([state.slots[role.slot] for role in variant.invariants])

    def compile_once(self, route: Route) -> None:
        """Compile the program that computes what is kept for a run, if a route has one."""
        traced = self.traced(route)
        hoisted = traced.hoisted
        with self._lock:
            if hoisted is None or traced in self._once:
                return
            name = "half/once" if route.half else "once"
            lowered = self._lower(Variant(name, hoisted.once, tuple(hoisted.roles.values()), repeated=False), traced)
            values = [node.meta.get("val") for node in traced.gm.graph.find_nodes(op="placeholder")]
            self._once[traced] = lowered, SymbolBinder.of(values[: len(traced.inputs)], hoisted.sizes)

    def _warn_restless(self, traced: Traced, index: int) -> None:
        placeholder = traced.gm.graph.find_nodes(op="placeholder")[index]
        name = traced.names.get(str(placeholder.name), str(placeholder.name))
        if name not in self._restless:
            self._restless.add(name)
            warn(
                f"the input {name} is another tensor at every step, so what depends on it alone is computed each time: "
                "give the same tensor object in all steps of a run, or (if its values stay the same) name it in "
                'options["invariant_inputs"], or switch this off with options["invariants"] = False',
                self.warnings, stacklevel=2,
            )  # fmt: skip

    def compile(self, phase: Phase) -> LoweredVariant:
        """The lowered variant of a phase, compiled once. The cond lowering has one for all phases of a route."""
        key = phase.route, phase.predicted
        with self._lock:
            if key in self._by_phase:
                return self._by_phase[key]
            variant = self.variant(phase)
            lowered = self.variants.get(variant.name)
            if lowered is None:
                lowered = self._lower(variant, self.traced(phase.route))
            self._by_phase[key] = lowered
            return lowered

    def _lower(self, variant: Variant, traced: Traced) -> LoweredVariant:
        with self._lock:
            added = variant.gm.graph.find_nodes(op="placeholder")[len(traced.inputs) :]
            roles = {node.name: role for node, role in zip(added, variant.inputs, strict=True)}
            dump(variant.name, variant.gm.graph, {**traced.names, **role_names(roles, self.plan)})
            lowered = lower(variant, traced.inputs, self.lowering, traced.context)
            logger.info("variant %s: %d nodes, %.2f s", lowered.name, lowered.nodes, lowered.compile_seconds)
            self.variants[variant.name] = lowered
            return lowered

    def variant(self, phase: Phase) -> Variant:
        """The graph that runs in a phase, before it is lowered."""
        if self.lowering == "cond" and phase.route.predicts:
            name = "/".join(part for part in (phase.route.name, "cond") if part)
            return all_phases(self.canonical(phase.route), name)
        if self.splits(phase.route):
            return specialize_rest(self.canonical(phase.route), self.plan, phase)
        return self.specialized(phase)

    def specialized(self, phase: Phase) -> Variant:
        """The straight-line graph of a phase."""
        return specialize(self.canonical(phase.route), self.plan, phase)

    def canonical(self, route: Route = WHOLE) -> Canonical:
        """The canonical form of a route."""
        with self._lock:
            if route not in self._canonical:
                traced = self.traced(route)
                invariants = None if traced.hoisted is None else traced.hoisted.roles
                canonical = self._canonical[route] = rewrite(traced.gm, self.plan, route, invariants)
                name = "/".join(part for part in (route.name, "canonical") if part)
                dump(name, canonical.gm.graph, self.names(route))
            return self._canonical[route]

    def names(self, route: Route = WHOLE) -> dict[str, str]:
        """What the inputs of a route's graphs are called in prints."""
        return {**self.traced(route).names, **role_names(self.canonical(route).roles, self.plan)}

    def traced(self, route: Route) -> Traced:
        """The graph that a route runs on."""
        if not route.half:
            return self.full
        assert self.half is not None, "a half-batch route needs the half-batch graph"
        return self.half

    def _weights_tensor(self, group: str, weights: tuple[float, ...] | None) -> torch.Tensor:
        """The weights on the device, made once per set of values: a schedule that repeats copies nothing.

        On an accelerator the copy starts from pinned memory and does not wait for the device.
        """
        dtype, device = self._weights_at[group]
        if weights is None:  # the cond program takes them in every phase and reads them in none but predicted ones
            weights = (0.0,) * self.plan.weight_count(group)
        return self._device_tensor(group, weights, dtype, device)

    def _device_tensor(self, name: str, numbers: tuple[float, ...], dtype: torch.dtype,
                       device: torch.device) -> torch.Tensor:  # fmt: skip
        key = (name, numbers)
        tensor = self._weights.get(key)
        if tensor is None:
            with torch.inference_mode(False):
                tensor = torch.tensor(numbers, dtype=dtype)
                if device.type == "cuda":
                    tensor = tensor.pin_memory()
                tensor = tensor.to(device, non_blocking=True)
            if len(self._weights) >= 4096:
                self._weights.clear()
            self._weights[key] = tensor
        return tensor


class CurrentCall(threading.local):
    """The call that a thread is in: set by the dispatcher around the compiled graph, read inside it."""

    call: StepCall | None = None


def step_runner(current: CurrentCall) -> Callable[[list[Any]], Any]:
    """The boxed callable that AOTAutograd calls in place of a compiled graph: the program of the call runs."""

    def run(inputs: list[Any]) -> Any:
        call = current.call
        assert call is not None, "a compiled graph runs inside a call of its dispatcher"
        return call.program.run(inputs, call)

    run._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]
    return run


__all__ = ["CurrentCall", "Pending", "Program", "StepCall", "Traced", "step_runner"]
