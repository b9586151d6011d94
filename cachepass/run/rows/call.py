"""Rows: one call of a graph makes a step of several requests, each at its own.

    names, inputs -> a run and a phase for each row -> rows of one phase in one program -> results in the rows' order

Every row is a step of its run as if it were called alone: its own clock, schedule, history and decision. Rows that turn
out to be in one phase run together, in calls of the sizes that there are programs for (``program/rows/programs.py``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import RowsError
from ...program.once import Invariants
from ...program.phases import Phase
from ...recipe.vocabulary import PLAIN
from ..context import Told, saying
from ..dispatch import Dispatcher, PreparedStep
from ..instance import Instance
from ..invariants import InvariantState
from ..model import is_far
from ..reach import WARMING, Warming
from ..runs import Call, Run
from ..step import StepCall
from .step import RowsCall, RowsStep


@dataclass(eq=False)
class _Row:
    """One request in a call: its step. ``prepared``: None where nothing tells which run it is of."""

    said: Told
    inputs: list[Any]
    call: Call
    partner: Run | None = None
    prepared: PreparedStep | None = None


def call_rows(dispatcher: Dispatcher, batch: RowsCall, inputs: Sequence[Any]) -> Any:
    """What the graph returns for the first row; of all rows it is in ``batch``.

    Raises:
        RowsError: The graph cannot be called for several requests.
        ConcurrencyError: One of them is in the middle of a step.
        PoolError: There is no place for another request.
    """
    if dispatcher.is_part or batch.results is not None:
        raise RowsError(
            "the model is many graphs, and rows are those of a whole one",
            where="cachepass.rows",
            hint="compile the whole model with fullgraph=True",
        )
    led = {i: batch.leading[id(value)] for i, value in enumerate(inputs) if id(value) in batch.leading}
    instance = dispatcher.instances.called(inputs)
    rows: list[_Row] = []
    with contextlib.ExitStack() as stack:
        succeeded = False
        try:
            rows.extend(_enter(dispatcher, instance, batch, led, inputs, stack))
            result = _step(dispatcher, instance, batch, rows, inputs)
            succeeded = True
        finally:
            for row in rows:
                if row.call.run is not None and not row.call.joined:
                    row.call.run.failed = True  # another row failed before it: its call comes again
                instance.model.finish(row.call, succeeded=succeeded)
    return result


def _enter(
    dispatcher: Dispatcher,
    instance: Instance,
    batch: RowsCall,
    led: Mapping[int, torch.Tensor],
    inputs: Sequence[Any],
    stack: contextlib.ExitStack,
) -> Iterator[_Row]:
    """Find the run of each row, which nobody else may step in until the stack is left."""
    timesteps = _timesteps(dispatcher, instance, batch, led)
    for index in range(batch.count):
        own = list(inputs)
        for i, values in led.items():
            own[i] = values[index]
        said = batch.said.row(index)
        timestep = None if timesteps is None else timesteps[index]
        said = said if timestep is None else said.without_timestep()
        with saying(said):
            call = dispatcher.call_of(instance.model, own, timestep)
            assert call is not None, "the graph is the whole model"
            row = _Row(said, own, call)
            if call.run is not None:
                call.run.acquire()
                stack.callback(call.run.release)
                row.partner = dispatcher.partner(instance.model)
                if row.partner is not None:
                    stack.enter_context(row.partner.exclusively())
        yield row


def _timesteps(
    dispatcher: Dispatcher, instance: Instance, batch: RowsCall, led: Mapping[int, torch.Tensor]
) -> list[Any] | None:
    """The timesteps of the rows where the model's input has one for each, read once for all; None: it has not, or it
    lies where it would have to be waited for, and nobody asks."""
    index, rows = dispatcher.layout.timestep, batch.said.rows
    values = None if index is None or rows is None or rows.timesteps is not None else led.get(index)
    if values is None or (is_far(values) and not instance.model.watches_time):
        return None
    return values.flatten(1).amax(1).tolist()


def _step(
    dispatcher: Dispatcher, instance: Instance, batch: RowsCall, rows: Sequence[_Row], inputs: Sequence[Any]
) -> Any:
    assert dispatcher.compiled is not None
    if dispatcher.program is None:
        return _one_by_one(dispatcher, instance, batch, rows)
    device = dispatcher.device(inputs)
    for row in rows:
        with saying(row.said):
            if row.call.run is not None:
                row.prepared = dispatcher.prepare(instance, row.call.run, row.call, row.partner, row.inputs)
    calls = [row.prepared.call if row.prepared else StepCall(dispatcher.program, Phase(route=PLAIN)) for row in rows]
    kept = [_keeper(row) for row in rows]
    pool = next((row.prepared.place.pool() for row in rows if row.prepared is not None), None)
    step = RowsStep(dispatcher.program, calls, batch, pool, dispatcher.options.row_sizes, kept)
    warming = WARMING.get()
    step.warming = None if warming is None else _reached(dispatcher, warming)
    dispatcher.current.call = step
    try:
        result = dispatcher.compiled(*inputs)
    finally:
        dispatcher.current.call = None
    for row in rows:
        if row.prepared is not None:
            with saying(row.said):
                dispatcher.commit(row.prepared, device)
    return result


def _keeper(row: _Row) -> Callable[[Invariants], InvariantState | None]:
    """What a row keeps until the end of its run, found in the middle of its step."""
    prepared = row.prepared
    if prepared is None:
        return lambda _: None

    def find(kept: Invariants) -> InvariantState | None:
        state = prepared.call.invariants = prepared.place.invariants(prepared.run, kept)
        return state

    return find


def _reached(dispatcher: Dispatcher, warming: Warming) -> list[Phase]:
    assert dispatcher.program is not None
    return warming.phases(dispatcher.program, dispatcher.method, dispatcher.options)


def _one_by_one(dispatcher: Dispatcher, instance: Instance, batch: RowsCall, rows: Sequence[_Row]) -> Any:
    """The rows of a graph in which nothing is cached."""
    assert dispatcher.compiled is not None
    found = []
    for row in rows:
        if row.call.run is not None:
            instance.model.enter(row.call)
            row.call.run.note(dispatcher.idle_groups, ())
        found.append(dispatcher.compiled(*row.inputs))
    columns = list(zip(*found, strict=True))
    led = [isinstance(column[0], torch.Tensor) for column in columns]
    batch.results = [(torch.stack(c) if is_led else c[0], is_led) for c, is_led in zip(columns, led, strict=True)]
    return [value[0] if is_led else value for value, is_led in batch.results]
