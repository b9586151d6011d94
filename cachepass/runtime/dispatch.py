"""Dispatch: what happens on each call of a compiled model, around its program.

    clock -> schedule -> phase and weights -> variant(inputs + weights + slots) -> commit

The dispatcher stands where Dynamo calls the compiled graph, so it sees the model's inputs by name: the parameters,
whose identity tells which instance of the model is called, and the timestep.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import BatchError, CachepassWarning
from ..graph.half import HalfCall
from ..graph.plan import NOTHING, Phase
from ..methods import PLAIN, WHOLE, Guidance, Method, Route, Step
from ..options import CompileOptions
from .context import current_context, guidance_partner
from .program import CurrentCall, Program, StepCall
from .state import RunState

logger = logging.getLogger(__name__)
LIVE: weakref.WeakSet[Dispatcher] = weakref.WeakSet()
_QUIET_STEPS = 8  # without num_inference_steps, a run this long that predicted nothing is worth a warning


@dataclass(frozen=True)
class InputLayout:
    """Where things stand among the inputs of a Dynamo graph.

    Attributes:
        identity: Indices of the tensors whose identity tells which instance of the model is called.
        timestep: Index of the timestep input, if there is one.
    """

    identity: tuple[int, ...]
    timestep: int | None


@dataclass(frozen=True)
class HalfRun:
    """The half-batch graph as a callable, and how to call it."""

    run: Callable[..., Any]
    call: HalfCall


@dataclass
class Instance:
    """One model instance: its states by context, and what they did so far."""

    states: dict[str, RunState] = field(default_factory=dict)
    computed: dict[str, int] = field(default_factory=dict)
    predicted: dict[str, int] = field(default_factory=dict)
    runs: int = 0
    steps: int = 0


class Dispatcher:
    """The callable that Dynamo gets for one graph."""

    def __init__(self, method: Method, options: CompileOptions, layout: InputLayout,
                 roots: Sequence[torch.nn.Module]) -> None:  # fmt: skip
        self.method, self.options, self.layout = method, options, layout
        self.roots = [weakref.ref(root) for root in roots]
        self.instances: dict[tuple[int, ...], Instance] = {}
        self.program: Program | None = None  # set by the backend while the graph is compiled; None: nothing is cached
        self.idle_groups: tuple[str, ...] = ()  # the groups of a schedule that never predicts
        self.compiled: Callable[..., Any] | None = None
        self.half: HalfRun | None = None  # for guidance batches
        self.current = CurrentCall()
        self._lock = threading.Lock()
        self._warned = False
        self._callback: Callable[[], float] | None = getattr(method.config, "current_timestep_callback", None)
        self._watch_timestep = method.needs_timestep or options.num_inference_steps is None
        self._read_identity = operator.itemgetter(*layout.identity) if layout.identity else None
        LIVE.add(self)

    # ---- a call -----------------------------------------------------------------------------------------------------

    def __call__(self, *inputs: Any) -> Any:
        assert self.compiled is not None
        instance = self._instance(inputs)
        context = current_context()
        state, partner = self._state(instance, context), None
        with contextlib.ExitStack() as stack:
            stack.enter_context(state.exclusively())
            if self.method.guidance is not None and self.program is not None:
                partner = self._partner(instance, context)
                if partner is not None:
                    stack.enter_context(partner.exclusively())
            timestep = self._timestep(inputs)
            if state.clock.starts_run(timestep):
                self._end_run(instance, state, partner)
            call = self._decide(state, partner, timestep)
            self.current.call = call
            try:
                result = self._run(call, inputs)
            finally:
                self.current.call = None
            if state.clock.index == 0:
                instance.runs += 1
            self._count(instance, call.computed or self.idle_groups, call.predicted)
            state.commit(call.weights, call.computed, call.predicted, timestep)
            if state.clock.index == self.options.num_inference_steps:
                self._report_idle(state, partner)
        return result

    def _run(self, call: StepCall, inputs: Sequence[Any]) -> Any:
        assert self.compiled is not None
        if not call.phase.route.half:
            return self.compiled(*inputs)
        assert self.half is not None
        return self.half.call.outputs(self.half.run(*self.half.call.inputs(inputs)))

    def _decide(self, state: RunState, partner: RunState | None, timestep: float | None) -> StepCall:
        """The schedule: the call's route, and what is predicted on it with which weights."""
        step = Step(state.clock.index, timestep, self._root() if self.method.needs_model else None)
        route, allowed, scheduled = WHOLE, True, tuple(state.groups)
        guidance = self.method.guidance
        predicted, computed, weights = [], [], {}
        if guidance is not None and self.program is not None:
            route = self._route(guidance, state, partner, step)
            allowed = route.predicts and (partner is None or self._skips(guidance, partner, step))
            scheduled = tuple(group for group in scheduled if route.keeps and group != guidance.group)
            if route.weighted:
                predicted.append(guidance.group)
                weights[guidance.group] = self.method.weights(guidance.group, step, state.groups[guidance.group])
            elif route in (guidance.both, guidance.uncond):
                computed.append(guidance.group)
        groups = []
        for group in scheduled:
            history = state.groups[group]
            if allowed and history.steps and self.method.predicts(group, step):
                groups.append(group)
                if state.plan.weighted(group):
                    weights[group] = self._weights(state, group, step)
            else:
                computed.append(group)
        phase = Phase(tuple(groups), route)
        return StepCall(self.program, state, phase, (*predicted, *groups), tuple(computed), weights, partner)

    def _weights(self, state: RunState, group: str, step: Step) -> tuple[float, ...]:
        history, regions = state.groups[group], state.plan.weight_regions(group)
        if len(regions) == 1:
            return self.method.weights(group, step, history, regions[0])
        return tuple(w for region in regions for w in self.method.weights(group, step, history, region))

    # ---- guidance ---------------------------------------------------------------------------------------------------

    def _partner(self, instance: Instance, context: str) -> RunState | None:
        """The state of the other call of a two-call guidance step; None for a guidance batch."""
        pair = guidance_partner(context)
        if (pair is None) == (self.half is not None):
            return None if pair is None else self._state(instance, pair[1])
        ways = (
            "two calls per step (in the cache contexts 'cond' and 'uncond')",
            "guidance batches (in one call per step)",
        )
        captured, called = ways if self.half is None else reversed(ways)
        raise BatchError(
            f"the model was captured for {captured} at this size and is called as for {called}",
            where=f"cache context {context!r}",
            hint="call torch._dynamo.reset() before changing the way of calling",
        )

    def _route(self, guidance: Guidance, state: RunState, partner: RunState | None, step: Step) -> Route:
        if partner is None:
            return guidance.half if self._skips(guidance, state, step) else guidance.both
        if guidance_partner(state.context) == ("cond", partner.context):
            return guidance.cond
        if partner.clock.index != state.clock.index + 1:
            return PLAIN  # the conditional call of this step did not come first: there is nothing to compare with
        return guidance.answer if self._skips(guidance, state, step) else guidance.uncond

    def _skips(self, guidance: Guidance, state: RunState, step: Step) -> bool:
        """The unconditional branch is skipped in this step; ``state`` keeps its difference."""
        return bool(state.groups[guidance.group].steps) and self.method.predicts(guidance.group, step)

    def _root(self) -> torch.nn.Module | None:
        return self.roots[0]() if self.roots else None

    def _timestep(self, inputs: Sequence[Any]) -> float | None:
        """The timestep in the unit of the config's ranges. On an accelerator reading it waits for the device once."""
        if not self._watch_timestep:
            return None
        if self._callback is not None:
            return float(self._callback())
        if self.layout.timestep is None:
            return None
        value = inputs[self.layout.timestep]
        if isinstance(value, torch.Tensor):
            value = (value if value.ndim == 0 else value.flatten()[0]).item()
        return float(value) * self.options.timestep_scale

    # ---- instances and states ---------------------------------------------------------------------------------------

    def _instance(self, inputs: Sequence[Any]) -> Instance:
        if self._read_identity is None:
            key: tuple[int, ...] = ()
        elif len(self.layout.identity) == 1:
            key = (id(self._read_identity(inputs)),)
        else:
            key = tuple(map(id, self._read_identity(inputs)))
        instance = self.instances.get(key)
        if instance is None:
            with self._lock:
                instance = self.instances.setdefault(key, Instance())
            for index in self.layout.identity[:1]:
                # The key is made of ids, which are given anew when the parameters are gone: so must the state be.
                weakref.finalize(inputs[index], _forget_instance, weakref.ref(self), key)
        return instance

    def _state(self, instance: Instance, context: str) -> RunState:
        state = instance.states.get(context)
        if state is None:
            plan = NOTHING if self.program is None else self.program.plan
            with self._lock:
                fresh = RunState(context, plan, self.options.num_inference_steps)
                state = instance.states.setdefault(context, fresh)
        return state

    def reset(self, instance: Instance) -> None:
        """End the current run in every context of an instance."""
        for state in instance.states.values():
            with state.exclusively():
                state.forget_history()
                state.clock.forget()

    def belongs_to(self, model: torch.nn.Module) -> list[Instance]:
        """The instances that are ``model`` (their parameters are among its own)."""
        own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        is_root = any(root() is model for root in self.roots)
        return [i for key, i in self.instances.items() if (set(key) <= own if key else is_root)]

    # ---- accounting -------------------------------------------------------------------------------------------------

    def _count(self, instance: Instance, computed: Sequence[str], predicted: Sequence[str]) -> None:
        instance.steps += 1
        for group in computed:
            instance.computed[group] = instance.computed.get(group, 0) + 1
        for group in predicted:
            instance.predicted[group] = instance.predicted.get(group, 0) + 1

    def _end_run(self, instance: Instance, state: RunState, partner: RunState | None) -> None:
        if self.options.num_inference_steps is None and state.clock.index >= _QUIET_STEPS:
            self._report_idle(state, partner)
        logger.debug("run of %d steps ended in context %r (%d so far)", state.clock.index, state.context, instance.runs)
        state.forget_history()

    def _report_idle(self, state: RunState, partner: RunState | None) -> None:
        """Warn once if a run is over and nothing was predicted in it."""
        groups = [*state.groups.values(), *(partner.groups.values() if partner is not None else ())]
        if not self._warned and groups and all(g.predicted == 0 for g in groups):
            self._warned = True
            warnings.warn(
                f"the cache never fired in a run of {state.clock.index} steps: "
                + self.method.why_idle(state.clock.seen), CachepassWarning, stacklevel=2,
            )  # fmt: skip


def _forget_instance(dispatcher: weakref.ref[Dispatcher], key: tuple[int, ...]) -> None:
    owner = dispatcher()
    if owner is not None:
        owner.instances.pop(key, None)
