"""A program: everything that was made of one ATen graph, and how a call of it runs.

Variants are compiled when a step first needs them and then kept. The program knows no schedule: it is told which
groups are predicted, with which weights, on which state.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .. import _torch
from ..graph.plan import CachePlan, Phase
from ..graph.rewrite import Canonical, rewrite, role_names, weights_dtype
from ..graph.show import readable
from ..graph.specialize import Variant, all_phases, specialize
from ..lower import LoweredVariant, lower
from ..methods import WHOLE, Route
from .state import OutputState, RunState

logger = logging.getLogger(__name__)
_TRUE_FALSE = (torch.tensor(False), torch.tensor(True))


@dataclass
class StepCall:
    """One call of a program: its phase, the state it runs on, and weights.

    ``computed`` are the groups whose outputs are kept. ``output`` is what is kept for guidance, ``partner`` that of the
    other call of a two-call guidance step; both are None where there is none. ``difference``: whether this call writes
    the difference of the two branches (True) or uses it (False); None: neither.
    """

    program: Program
    phase: Phase
    state: RunState | None = None  # None: nothing is kept, nothing is predicted
    computed: tuple[str, ...] = ()
    weights: dict[str, tuple[float, ...]] = field(default_factory=dict)
    output: OutputState | None = None
    partner: OutputState | None = None
    difference: bool | None = None

    def output_slot(self, name: str) -> torch.Tensor:
        """A slot for what is kept of the model's output: the partner's, if it wrote one of this name."""
        holder = self.partner if self.partner is not None and name in self.partner.slots else self.output
        assert holder is not None
        return holder.slot(name)


@dataclass(frozen=True)
class Traced:
    """An ATen graph with markers, AOTAutograd's example inputs, the context to compile it in, and input names."""

    gm: fx.GraphModule
    inputs: tuple[Any, ...]
    context: _torch.SavedContext
    names: dict[str, str]


class Program:
    """The variants of one model: of its graph and, where steps may skip half of the batch, of its half-batch graph."""

    def __init__(self, full: Traced, half: Traced | None, plan: CachePlan, lowering: str) -> None:
        self.full, self.half, self.plan, self.lowering = full, half, plan, lowering
        self.variants: dict[str, LoweredVariant] = {}
        self._canonical: dict[Route, Canonical] = {}
        self._by_phase: dict[tuple[Route, tuple[str, ...]], LoweredVariant] = {}
        self._weights: dict[tuple[object, ...], torch.Tensor] = {}
        devices = {cut.group: cut.device for cut in plan.live_cuts if cut.history}
        self._weights_at = {g: (weights_dtype(plan, g), devices[g]) for g in plan.groups if plan.weighted(g)}
        if plan.output is not None:
            group = plan.output.guidance.group
            self._weights_at[group] = weights_dtype(plan, group), plan.output.slots[0].device
        self._lock = threading.RLock()

    def run(self, inputs: list[Any], call: StepCall) -> Any:
        """Run the variant of the call's phase on the model's inputs (flat, as AOTAutograd gives them)."""
        phase = call.phase
        variant = self._by_phase.get((phase.route, phase.predicted)) or self.compile(phase)
        if call.state is not None:
            call.state.begin(call.computed, phase.predicted)
        if call.output is not None and call.difference:
            call.output.begin()
        for role in variant.scalars:
            if role.kind == "predicate":
                inputs.append(_TRUE_FALSE[role.group in phase.predicted])
            else:
                inputs.append(self._weights_tensor(role.group, call.weights.get(role.group)))
        if variant.slots:
            assert call.state is not None, "a variant with slots runs on a state"
            inputs.extend(call.state.slot_list(variant.slots))
        for role in variant.outputs:
            inputs.append(call.output_slot(role.slot))
        return variant.run(inputs)

    def compile(self, phase: Phase) -> LoweredVariant:
        """The lowered variant of a phase, compiled once. The cond lowering has one for all phases of a route."""
        key = phase.route, phase.predicted
        with self._lock:
            if key in self._by_phase:
                return self._by_phase[key]
            variant = self.variant(phase)
            lowered = self.variants.get(variant.name)
            if lowered is None:
                traced, names = self._traced(phase.route), self.names(phase.route)
                _torch.dump_graph(f"variant_{variant.name}", lambda: readable(variant.gm.graph, names))
                lowered = lower(variant, traced.inputs, self.lowering, traced.context)
                logger.info("variant %s: %d nodes, %.2f s", lowered.name, lowered.nodes, lowered.compile_seconds)
                self.variants[variant.name] = lowered
            self._by_phase[key] = lowered
            return lowered

    def variant(self, phase: Phase) -> Variant:
        """The graph that runs in a phase, before it is lowered."""
        if self.lowering == "cond" and phase.route.predicts:
            name = "/".join(part for part in (phase.route.name, "cond") if part)
            return all_phases(self.canonical(phase.route), name)
        return self.specialized(phase)

    def specialized(self, phase: Phase) -> Variant:
        """The straight-line graph of a phase."""
        return specialize(self.canonical(phase.route), self.plan, phase)

    def canonical(self, route: Route = WHOLE) -> Canonical:
        """The canonical form of a route."""
        with self._lock:
            if route not in self._canonical:
                self._canonical[route] = rewrite(self._traced(route).gm, self.plan, route)
            return self._canonical[route]

    def names(self, route: Route = WHOLE) -> dict[str, str]:
        """What the inputs of a route's graphs are called in prints."""
        return {**self._traced(route).names, **role_names(self.canonical(route).roles, self.plan)}

    def _traced(self, route: Route) -> Traced:
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
            weights = (0.0,) * (self.plan.history(group) * len(self.plan.weight_regions(group)))
        key = (group, weights)
        tensor = self._weights.get(key)
        if tensor is None:
            with torch.inference_mode(False):
                tensor = torch.tensor(weights, dtype=dtype)
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


__all__ = ["CurrentCall", "Program", "StepCall", "Traced", "step_runner"]
