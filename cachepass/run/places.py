"""Places: where what a run keeps for one graph is found, at one size, and made at its first step.

A run that is called by itself keeps it in memory of its own; one that is a row of a call of several requests, in pages
of their pool. Where it changes from one to the other, what it keeps is moved.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..capture.inputs import InputLayout
from ..method import Method
from ..options import CompileOptions
from ..program.rows.pools import pooled
from ..program.runnable import Invariants, Runnable
from ..program.sizes import SymbolBinder
from .context import surroundings
from .instance import Instance
from .invariants import InvariantState
from .rows.pool import Pool, bytes_of_request
from .runs import Call, Run
from .state import Memory, OutputState, RunState

_MOST_SEATS = 16  # where the user did not say how many requests there are
_MOST_LAYOUTS = 64  # of sizes that were seen; made anew in a moment


class Graph(Protocol):
    """What is asked of the dispatcher of a graph."""

    method: Method
    options: CompileOptions
    layout: InputLayout
    program: Runnable | None
    binder: SymbolBinder

    @property
    def prefix(self) -> str: ...

    def device(self, inputs: Sequence[Any]) -> torch.device: ...


class Places:
    """The layouts of one graph, by the sizes of its inputs."""

    def __init__(self) -> None:
        self._layouts: dict[tuple[int, ...], tuple[Hashable, Callable[[object], int]]] = {}

    def of(self, graph: Graph, instance: Instance, call: Call, inputs: Sequence[Any]) -> Place:
        """The place of a call of the graph with these inputs."""
        program = graph.program
        assert program is not None
        sizes = graph.binder.key(inputs)
        if sizes not in self._layouts:
            if len(self._layouts) >= _MOST_LAYOUTS:
                self._layouts.clear()
            resolve = graph.binder.resolver(inputs)
            self._layouts[sizes] = program.plan.layout(resolve, graph.prefix), resolve
        layout, resolve = self._layouts[sizes]
        # Batches of both branches and conditional ones alone keep the same: the conditional half.
        kind = call.kind if graph.method.guidance is None else None
        key = kind, instance.prefix, layout
        return Place(graph, program, instance, call, inputs, key, resolve, surroundings().is_row)


@dataclass(frozen=True, eq=False)
class Place:
    """What calls of a graph keep, at one size, in one instance of its model.

    Attributes:
        key: Equal for calls that go on with what others kept.
        in_pool: The call is a row of several.
    """

    graph: Graph
    program: Runnable
    instance: Instance
    call: Call
    inputs: Sequence[Any]
    key: Hashable
    resolve: Callable[[object], int]
    in_pool: bool

    def state(self, run: Run) -> RunState:
        """What a run keeps of the graph's cuts; a step of it is about to be made."""
        model = self.instance.model
        key = self.key, self.call.occurrence(self.key)
        state = run.states.get(key)
        if state is None:
            memory = self._memory(run)
            state = RunState(self.program.plan, self.resolve, memory)
            if memory.pooled:
                state.make_slots()
            else:
                model.make_room(state.planned_bytes, self.graph.device(self.inputs), run)
            state = run.states.setdefault(key, state)
        elif state.memory.pooled != self.in_pool:
            state.move(self._memory(run))
        state.stamp = run.stamp
        state.follow(run.epoch, run.clock.index)
        sizing = self.graph.layout.sizing
        if sizing and state.follow_sizes([self.inputs[i] for i in sizing]):
            model.warn_once(
                "sizing",
                "an input that the sizes of kept values depend on is another tensor in the middle of a run, "
                "so what was kept is dropped and computed anew: give the same tensor object in all steps of a run",
            )
        return state

    def invariants(self, run: Run, kept: Invariants | None) -> InvariantState | None:
        """What a run keeps until its end."""
        if kept is None:
            return None
        state = run.invariants.get(kept)
        if state is None:
            memory = self._memory(run)
            state = InvariantState(kept, memory)
            if not memory.pooled:
                self.instance.model.make_room(kept.slot_bytes, kept.slots[0].device, run)
            state = run.invariants.setdefault(kept, state)
        state.stamp = run.stamp
        return state

    def output(self, run: Run) -> OutputState | None:
        """What a run keeps of the model's output, for guidance."""
        plan = self.program.plan.output
        if plan is None:
            return None
        state = run.outputs.get(plan.slots)
        if state is None:
            memory = self._memory(run)
            state = OutputState(plan, memory)
            if not memory.pooled:
                self.instance.model.make_room(plan.slot_bytes, plan.slots[0].device, run)
            state = run.outputs.setdefault(plan.slots, state)
        elif state.memory.pooled != self.in_pool:
            state.move(self._memory(run))
        state.stamp = run.stamp
        state.follow(run.epoch)
        return state

    def _memory(self, run: Run) -> Memory:
        """Where a run's slots lie from now on."""
        if not self.in_pool:
            run.seats.pop(self.key, None)
            return Memory()
        seat = run.seats.get(self.key)
        if seat is None:
            seat = run.seats[self.key] = self.pool().take(run.context, self.instance.model.free_idle)
        return seat

    def pool(self) -> Pool:
        """The pages of all requests.

        Raises:
            PoolError: They would take more than may be kept.
        """
        options, model = self.graph.options, self.instance.model
        device = self.graph.device(self.inputs)

        def make() -> Pool:
            slots = pooled(self.program.plan)
            seats = options.pool_requests
            if seats is None:  # a quarter is left for what the plan does not know
                fit = 3 * model.room.limit_on(device) // 4 // max(bytes_of_request(slots, self.resolve), 1)
                seats = max(1, min(_MOST_SEATS, fit))
            pool = Pool(seats, options.pool_wait, lambda needed: model.pools.reserve(needed, seats, device))
            pool.add(slots, self.resolve)
            return pool

        return model.pools.at(self.key, make)
