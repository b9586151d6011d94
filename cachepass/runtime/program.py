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

from .. import _torch
from ..graph.plan import CachePlan, Phase
from ..graph.rewrite import Canonical, Role, weights_dtype
from ..graph.show import readable
from ..graph.specialize import Variant, all_phases, specialize
from ..lower import LoweredVariant, lower
from .state import RunState, SymbolBinder, resolve_size

logger = logging.getLogger(__name__)
_TRUE_FALSE = (torch.tensor(False), torch.tensor(True))


@dataclass
class StepCall:
    """One call: the state it runs on, what is predicted in it, and the weights of the groups that need them."""

    state: RunState
    predicted: Phase
    computed: tuple[str, ...]
    weights: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def compute_all(self) -> None:
        """Predict nothing after all: the history that this was decided on does not fit the call."""
        self.computed, self.predicted, self.weights = tuple(self.state.groups), (), {}


class Program:
    """The variants of one canonical graph."""

    def __init__(self, canonical: Canonical, plan: CachePlan, inputs: Sequence[Any], lowering: str,
                 context: _torch.SavedContext, names: dict[str, str]) -> None:  # fmt: skip
        self.canonical, self.plan, self.lowering, self.context, self.names = canonical, plan, lowering, context, names
        self.variants: dict[str, LoweredVariant] = {}
        self._by_phase: dict[Phase, LoweredVariant] = {}
        self._inputs = list(inputs)
        self._binder = SymbolBinder.of(inputs, [s for cut in plan.live_cuts for s in (*cut.shape, *cut.stride)])
        self._weights: dict[tuple[object, ...], torch.Tensor] = {}
        devices = {cut.group: cut.device for cut in plan.live_cuts if cut.history}
        self._weights_at = {g: (weights_dtype(plan, g), devices[g]) for g in plan.groups if plan.weighted(g)}
        self._lock = threading.RLock()

    def run(self, inputs: list[Any], call: StepCall) -> Any:
        """Run the variant of the call's phase on the model's inputs (flat, as AOTAutograd gives them)."""
        bound = self._binder.bind(inputs)
        if call.state.allocate(tuple(bound.values()), lambda size: resolve_size(size, bound)):
            call.compute_all()
        variant = self._by_phase.get(call.predicted) or self.compile(call.predicted)
        call.state.begin(call.computed)
        for role in variant.inputs:
            if role.kind == "predicate":
                inputs.append(_TRUE_FALSE[role.group in call.predicted])
            elif role.kind == "weights":
                inputs.append(self._weights_tensor(role.group, call.weights.get(role.group)))
            else:
                break  # slots come last
        inputs.extend(call.state.slot_list(variant.inputs))
        return variant.run(inputs)

    def compile(self, phase: Phase) -> LoweredVariant:
        """The lowered variant of a phase, compiled once. The cond lowering has one for all phases."""
        with self._lock:
            if phase in self._by_phase:
                return self._by_phase[phase]
            variant = self.variant(phase)
            lowered = self.variants.get(variant.name)
            if lowered is None:
                _torch.dump_graph(f"variant_{variant.name}", lambda: readable(variant.gm.graph, self.names))
                lowered = lower(_slots_last(variant), self._inputs, self.lowering, self.context)
                logger.info("variant %s: %d nodes, %.2f s", lowered.name, lowered.nodes, lowered.compile_seconds)
                self.variants[variant.name] = lowered
            self._by_phase[phase] = lowered
            return lowered

    def variant(self, phase: Phase) -> Variant:
        """The graph that runs in a phase, before it is lowered."""
        if self.lowering == "cond":
            return all_phases(self.canonical)
        return specialize(self.canonical, self.plan, phase)

    def _weights_tensor(self, group: str, weights: tuple[float, ...] | None) -> torch.Tensor:
        """The weights on the device, made once per set of values: a schedule that repeats copies nothing.

        On an accelerator the copy starts from pinned memory and does not wait for the device.
        """
        dtype, device = self._weights_at[group]
        if weights is None:  # the cond program takes them in every phase and reads them in none but predicted ones
            weights = (0.0,) * self.plan.history(group)
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


def _slots_last(variant: Variant) -> Variant:
    """``run`` gives predicates and weights first, then all slots: hold the variant to that order."""
    kinds: list[bool] = [role.kind in ("history", "next") for role in variant.inputs]
    assert kinds == sorted(kinds), "slots come after predicates and weights"
    return variant


class CurrentCall(threading.local):
    """The call that a thread is in: set by the dispatcher around the compiled graph, read inside it."""

    call: StepCall | None = None


def step_runner(program: Program, current: CurrentCall) -> Callable[[list[Any]], Any]:
    """The boxed callable that AOTAutograd calls in place of one compiled graph."""

    def run(inputs: list[Any]) -> Any:
        assert current.call is not None, "a compiled graph runs inside a call of its dispatcher"
        return program.run(inputs, current.call)

    run._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]
    return run


__all__ = ["CurrentCall", "Program", "Role", "StepCall", "step_runner"]
