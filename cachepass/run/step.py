"""A step: one call of a program, on what a run keeps.

The schedule has said by now which groups are predicted, with which weights; of one it may have to be decided in the
middle of the call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..program.phases import Phase
from ..program.roles import Carried, Parameters, Predicate, Role, Verdict, Weights
from ..program.runnable import LoweredVariant, Once, Runnable
from ..program.verdict import BOUND_NUMBERS, quotient
from .invariants import RESTLESS, InvariantState
from .state import OutputState, RunState

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

    program: Runnable
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
        """A slot for what is kept of the model's output."""
        return self.holder(name).slot(name)

    def holder(self, name: str) -> OutputState:
        """Who keeps what is kept of the model's output by a name: the partner, if it wrote that."""
        holder = self.partner if self.partner is not None and name in self.partner.slots else self.output
        assert holder is not None
        return holder

    def begin(self, *, writes: bool = True) -> None:
        """The program of the call is about to run; ``writes``: into slots."""
        if self.state is not None:
            self.state.begin(self.computed, self.phase.predicted, writes=writes)
        if self.output is not None and self.difference:
            self.output.begin()

    def run(self, inputs: list[Any]) -> Any:
        """Run the variant of the call's phase on the model's inputs (flat, as AOTAutograd gives them)."""
        carried = self._decide(inputs) if self.program.splits(self.phase.route) else {}
        phase = self.phase
        variant = self.program.compile(phase)
        self.begin(writes=not (variant.kept and self.program.plan.returns))
        self._add_state(inputs, variant)
        inputs.extend(carried[role.name] for role in variant.carried)
        carried.clear()
        results = variant.run(inputs)
        if not variant.kept:
            return results
        own = len(results) - len(variant.kept)
        self._take(variant.kept, results[own:])
        return results[:own]

    def _add_state(self, inputs: list[Any], variant: LoweredVariant) -> None:
        """Everything that a variant takes behind the model's inputs, but what is carried."""
        if variant.invariants:
            self._add_invariants(inputs, variant)
        for role in variant.scalars:
            if isinstance(role, Predicate):
                inputs.append(_TRUE_FALSE[role.group in self.phase.predicted])
            elif isinstance(role, Weights):
                inputs.append(self._weights_tensor(role.group, self.weights.get(role.group)))
            else:
                inputs.append(self._numbers(role))
        for _ in variant.probes:
            assert self.state is not None, "a variant with a probe runs on a state"
            inputs.append(self.state.probe_slot())
        if variant.slots:
            assert self.state is not None, "a variant with slots runs on a state"
            inputs.extend(self.state.slot_list(variant.slots))
        for role in variant.outputs:
            inputs.append(self.output_slot(role.name))

    def _decide(self, inputs: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Run up to the decision, and take it if it is pending: one number comes from the device. What is carried."""
        variant = self.program.compile_decision(self.phase.route)
        own = [*inputs]
        self._add_state(own, variant)
        *values, told = variant.run(own)
        if self.pending is not None:
            distance = self._distance(told)
            self.settle(predict=self.pending.decide(distance), distance=distance)
        return {
            role.name: value for role, value in zip(variant.kept, values, strict=False) if isinstance(role, Carried)
        }

    def _distance(self, told: torch.Tensor) -> float:
        group = self.program.plan.process_group
        if group is None:
            return float(told)
        total = told.clone()  # a CUDA graph's output stays as it is
        torch.distributed.all_reduce(total, group=group)
        return float(quotient(total.cpu()))

    def _take(self, roles: Sequence[Role], values: Sequence[Any]) -> None:
        """What a program returned beside the model's outputs: values to keep, and the decision that it took."""
        state = self.state
        assert state is not None
        if isinstance(roles[-1], Verdict):
            *values, told = values
            roles = roles[:-1]
            if self.pending is not None:
                predict, distance = told.tolist()
                self.settle(predict=predict > 0.5, distance=distance)
        kept = [
            (role, value)
            for role, value in zip(roles, values, strict=True)
            if role.group not in self.phase.predicted or self.program.plan.recursive(role.group)
        ]
        state.receive(*zip(*kept, strict=True)) if kept else None

    def _numbers(self, role: Role) -> torch.Tensor:
        """The probe's parameters, or the bound of a decision."""
        probe = self.program.plan.probe
        assert probe is not None
        if isinstance(role, Parameters):
            return self.program.device_tensor("parameters", self.parameters, torch.float32, probe.slot.device)
        forced = (1.0 if role.group in self.phase.predicted else -1.0, *(0.0,) * (BOUND_NUMBERS - 1))
        bound = forced if self.pending is None else self.pending.bound
        return self.program.device_tensor("bound", bound, torch.float64, probe.slot.device)

    def _add_invariants(self, inputs: list[Any], variant: LoweredVariant) -> None:
        """What is kept for the run, computed first if it does not hold for these inputs."""
        state = self.refresh(inputs)
        assert state is not None
        inputs.extend([state.slots[role.name] for role in variant.invariants])

    def refresh(self, inputs: Sequence[Any]) -> InvariantState | None:
        """What the route keeps for the run, as it is for these inputs; None: it keeps nothing."""
        route = self.phase.route
        kept = self.program.invariants(route)
        if kept is None:
            return None
        once = self.program.compile_once(route)
        assert once is not None
        state = self.invariants or InvariantState(kept)
        self.renew(state, once, inputs, self.epoch)
        return state

    def renew(self, state: InvariantState, once: Once, inputs: Sequence[Any], epoch: int) -> None:
        """Compute what is kept for the run ``epoch``, unless it holds for these inputs; say so where it never does."""
        state.refresh(inputs, epoch, once.binder, once.run)
        if state.changes == RESTLESS and state.changed is not None:
            self.program.warn_restless(self.phase.route, state.changed, varies=bool(state.varies))

    def _weights_tensor(self, group: str, weights: tuple[float, ...] | None) -> torch.Tensor:
        dtype, device = self.program.weights_at[group]
        if weights is None:  # the cond program takes them in every phase and reads them in none but predicted ones
            weights = (0.0,) * self.program.plan.weight_count(group)
        return self.program.device_tensor(group, weights, dtype, device)


class Running(Protocol):
    """What runs in place of a compiled graph: the step of one request, or of several."""

    def run(self, inputs: list[Any]) -> Any: ...


class CurrentCall(threading.local):
    """The call that a thread is in: set by the dispatcher around the compiled graph, read inside it."""

    call: Running | None = None


def step_runner(current: CurrentCall) -> Callable[[list[Any]], Any]:
    """The boxed callable that AOTAutograd calls in place of a compiled graph: the program of the call runs."""

    def run(inputs: list[Any]) -> Any:
        call = current.call
        assert call is not None, "a compiled graph runs inside a call of its dispatcher"
        return call.run(inputs)

    run._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]
    return run
