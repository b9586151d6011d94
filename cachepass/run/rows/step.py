"""Row step: the programs of one call of several requests.

    steps of all rows -> what the run keeps -> decisions -> rows of one phase in one program -> results in their order

Rows that turn out to be in one phase run together, in calls of the sizes that there are programs for
(``program/rows/programs.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from ... import _torch
from ...errors import RowsError
from ...program.once import Invariants
from ...program.phases import Phase
from ...program.roles import Carried, Weights
from ...program.rows.pools import Page
from ...program.rows.variant import RowRunnable, RowVariant, is_fit, parts_of
from ...program.runnable import Runnable
from ...recipe.vocabulary import PLAIN, Route
from ..context import Told
from ..invariants import InvariantState
from ..step import StepCall
from .pool import Pool, Seat


@dataclass(eq=False)
class RowsCall:
    """A call of several requests, from the compiled model on to its graph.

    Attributes:
        said: What its surroundings say of it.
        leading: What all rows are given, rows in front, by the id of what the first row is given of it.
        given: The latter, which must exist as long as their ids are asked for.
        call: Calls the dispatcher of the graph, with the first row's inputs.
        results: What the graph returned, each with whether it has rows in front; None: it has not run.
    """

    said: Told
    leading: dict[int, torch.Tensor]
    given: list[Any]
    call: Callable[[Any, RowsCall, Sequence[Any]], Any]
    results: list[tuple[Any, bool]] | None = None

    @property
    def count(self) -> int:
        rows = self.said.rows
        assert rows is not None
        return len(rows.names)


ROWS: ContextVar[RowsCall | None] = ContextVar("cachepass_rows", default=None)


@dataclass(eq=False)
class RowsStep:
    """The steps of all rows, in place of the one call of a program.

    Attributes:
        calls: What the schedule says of each.
        pool: What those keep that are of a run.
        sizes: How many rows programs take.
        kept: For each row, what finds what it keeps until its run is over.
        warming: The phases of which every program is compiled first.
    """

    program: Runnable
    calls: list[StepCall]
    batch: RowsCall
    pool: Pool | None
    sizes: Sequence[int]
    kept: Sequence[Callable[[Invariants], InvariantState | None]]
    warming: list[Phase] | None = None
    _carried: dict[str, torch.Tensor] = field(default_factory=dict)
    _carried_at: dict[int, int] = field(default_factory=dict)
    _constants: dict[str, torch.Tensor] = field(default_factory=dict)
    _strides: dict[int, tuple[int, ...]] = field(default_factory=dict)  # of a row of each input that differs

    def run(self, inputs: list[Any]) -> Any:
        """Run the programs of all rows on the model's inputs, of which the first row's came; its results."""
        own, differ = self._all_rows(inputs)
        inputs.clear()
        programs = self.program.for_rows(differ, 1 if self.pool is None else self.pool.seats)
        if self.warming is not None:
            self._warm(programs, self.warming)
        self._renew(programs, own)
        for route in dict.fromkeys(call.phase.route for call in self.calls):
            if self.program.splits(route):
                self._decide(programs, route, own)
        pieces: list[_Piece] = []
        for members in _grouped([call.phase for call in self.calls]):
            for call in (self.calls[row] for row in members):
                call.begin()
            phase = self.calls[members[0]].phase
            if phase.route is PLAIN:
                pieces += [([row], None, self.calls[row].run(_row_of(own, differ, row))) for row in members]
                continue
            for start, end in parts_of(len(members), self.sizes):
                rows = members[start:end]
                variant = programs.compile(phase, len(rows))
                pieces.append((rows, variant, self._launch(variant, rows, own, differ)))
        self._carried.clear()
        self.batch.results = results = list(self._joined(pieces))
        return [value[0] if led else value for value, led in results]

    def _all_rows(self, inputs: Sequence[Any]) -> tuple[list[Any], frozenset[int]]:
        """The inputs of all rows, and the indices of those that differ, with rows in front.

        Raises:
            RowsError: Something that the first row was given came here as another tensor.
        """
        leading, differ = self.batch.leading, set()
        storages = {_torch.storage_of(value) for value in self.batch.given}
        own = list(inputs)
        for i, value in enumerate(inputs):
            if id(value) in leading:
                own[i] = leading[id(value)]
                self._strides[i] = value.stride()
                differ.add(i)
            elif _lies_in(value, storages):
                raise RowsError(
                    f"{self.program.input_name(self.calls[0].phase.route, i)} is a view of an input that has rows",
                    where="cachepass.rows",
                    hint="give the model tensors that are not views of each other",
                )
        return own, frozenset(differ)

    def _renew(self, programs: RowRunnable, own: Sequence[Any]) -> None:
        """Compute what is kept until runs are over, where it does not hold any more. What is kept for all requests is
        computed when a run begins, as a request's own is: a write that leaves no trace is seen then."""
        begins = any(not any(s.steps for s in call.state.groups.values()) for call in self.calls if call.state)
        renewed = set[Invariants]()
        for row, call in enumerate(self.calls):
            route = call.phase.route
            shared, ours = (None, None) if route is PLAIN else (programs.shared_once(route), programs.own_once(route))
            if shared is None and ours is None:
                continue
            inputs = _row_of(own, programs.differ, row)
            if shared is not None:
                assert self.pool is not None, "a row that is no plain call is a step of a run"
                state = self.pool.shared(shared.kept, anew=begins and shared.kept not in renewed)
                renewed.add(shared.kept)
                call.renew(state, shared.once, inputs, 0)
                self._constants.update(state.slots)
            if ours is not None:
                state = self.kept[row](ours.kept)
                assert state is not None, "a row that is no plain call is a step of a run"
                call.renew(state, ours.once, inputs, call.epoch)

    def _warm(self, programs: RowRunnable, phases: Sequence[Phase]) -> None:
        sizes = [size for size in self.sizes if size <= len(self.calls)]
        with self.program.side_by_side():
            for phase in phases:
                for size in sizes:
                    programs.compile(phase, size)
                    if self.program.splits(phase.route):
                        programs.compile_decision(phase.route, size)

    def _decide(self, programs: RowRunnable, route: Route, own: Sequence[Any]) -> None:
        """Run up to the decision for all rows of a route, and take those that are pending: what they are taken by comes
        from the device at once."""
        members = [row for row, call in enumerate(self.calls) if call.phase.route == route]
        found: list[list[Any]] = []
        roles: Sequence[Any] = ()
        for start, end in parts_of(len(members), self.sizes):
            variant = programs.compile_decision(route, end - start)
            roles = variant.kept
            found.append(self._launch(variant, members[start:end], own, programs.differ))
        *values, told = [_cat(parts) for parts in zip(*found, strict=True)]
        names = [role.name for role in roles if isinstance(role, Carried)]
        self._carried = dict(zip(names, values, strict=True))
        self._carried_at = {row: place for place, row in enumerate(members)}
        for row, distance in zip(members, told.tolist(), strict=True):
            pending = self.calls[row].pending
            if pending is not None:
                self.calls[row].settle(predict=pending.decide(distance), distance=distance)

    def _joined(self, pieces: Sequence[_Piece]) -> Iterator[tuple[Any, bool]]:
        """The model's results of all rows, in their order, and whether they have rows in front."""
        order = [row for rows, _, _ in pieces for row in rows]
        places = sorted(range(len(order)), key=order.__getitem__)
        _, first, found = pieces[0]
        for k in range(len(found) - (0 if first is None else len(first.kept))):
            values = [_value(piece, k) for piece in pieces]
            if not any(led for _, _, led in values):
                yield values[0][0], False
                continue
            joined = _cat([value if led else value.expand(size, *value.shape) for value, size, led in values])
            if places != list(range(len(places))):
                joined = joined.index_select(0, self._numbers("rows", places, joined.device))
            yield joined, True

    # ---- one program ------------------------------------------------------------------------------------------------

    def _launch(
        self, variant: RowVariant, rows: Sequence[int], own: Sequence[Any], differ: frozenset[int]
    ) -> list[Any]:
        graph = variant.graph
        given = list(own)
        for i in differ:
            given[i] = self._rows_of(own[i], rows, graph.inputs[i], self._strides[i])
        given += [self._constants[name] for name in graph.shared]
        given += [self._scalars(role, rows) for role in graph.scalars]
        places = [self._carried_at[row] for row in rows] if graph.carried else []
        start = len(given)
        for i, role in enumerate(graph.carried):
            given.append(self._rows_of(self._carried[role.name], places, graph.inputs[start + i]))
        if graph.pools:
            assert self.pool is not None, "a program that keeps something runs for a run"
            given += [self.pool.tensor(key) for key in graph.pools]
            given.append(self._pages(graph.pages, rows, given[-1].device))
        return list(variant.run(given))

    def _rows_of(
        self, value: torch.Tensor, rows: Sequence[int], like: torch.Tensor, strides: Sequence[int] = ()
    ) -> torch.Tensor:
        """Some rows of a value, in memory as a program expects it: like the example, or, where its sizes are symbols,
        each row with these strides. It is not copied if it lies so."""
        first, count = rows[0], len(rows)
        if list(rows) == list(range(first, first + count)):
            value = value[first : first + count]
        else:
            value = value.index_select(0, self._numbers("rows", rows, value.device))
        known = all(isinstance(step, int) for step in like.stride())
        wanted = like.stride() if known else (math.prod(value.shape[1:]), *(strides or value.stride()[1:]))
        if is_fit(value, wanted):
            return value
        with torch.no_grad():
            return torch.empty_strided(value.shape, wanted, dtype=value.dtype, device=value.device).copy_(value)

    def _scalars(self, role: Any, rows: Sequence[int]) -> torch.Tensor:
        """The weights of a group's forecast, or the parameters of the probe, for each row."""
        if isinstance(role, Weights):
            dtype, device = self.program.weights_at[role.group]
            numbers = [self.calls[row].weights[role.group] for row in rows]
        else:
            probe = self.program.plan.probe
            assert probe is not None
            dtype, device = torch.float32, probe.slot.device
            numbers = [self.calls[row].parameters for row in rows]
        flat = tuple(number for row in numbers for number in row)
        return self.program.device_tensor(f"{role} of rows", flat, dtype, device).view(len(rows), -1)

    def _numbers(self, name: str, numbers: Sequence[int], device: torch.device) -> torch.Tensor:
        return self.program.device_tensor(name, tuple(numbers), torch.int64, device)

    def _pages(self, pages: Sequence[Page], rows: Sequence[int], device: torch.device) -> torch.Tensor:
        numbers = [self._page(page, self.calls[row]) for page in pages for row in rows]
        return self._numbers("pages", numbers, device).view(len(pages), len(rows))

    def _page(self, page: Page, call: StepCall) -> int:
        holder = call.holder(page.output) if page.output else call.state
        assert holder is not None
        if page.output:
            call.output_slot(page.output)  # it is emptied when it is made
        seat = holder.memory
        assert isinstance(seat, Seat)
        if not page.group:
            return seat.number
        assert call.state is not None
        return seat.number * page.ring + call.state.page(page.group, page.ring, page.age)


def _lies_in(value: object, storages: Collection[int]) -> bool:
    if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter) or _torch.is_wrapper(value):
        return False
    return _torch.storage_of(value) in storages


def _row_of(own: Sequence[Any], differ: frozenset[int], row: int) -> list[Any]:
    """The model's inputs of one row."""
    given = list(own)
    for i in differ:
        given[i] = own[i][row]
    return given


def _grouped(phases: Sequence[Phase]) -> list[list[int]]:
    """Rows that are in one phase."""
    groups: dict[Phase, list[int]] = {}
    for row, phase in enumerate(phases):
        groups.setdefault(phase, []).append(row)
    return list(groups.values())


def _cat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


_Piece = tuple[list[int], "RowVariant | None", "list[Any]"]


def _value(piece: _Piece, k: int) -> tuple[Any, int, bool]:
    """A result of one program, of how many rows it is, and whether it has rows in front. Of a row that ran by itself
    it gets them."""
    rows, variant, found = piece
    value = found[k]
    if variant is None:
        tensor = isinstance(value, torch.Tensor)
        return (value.unsqueeze(0) if tensor else value), 1, tensor
    return value, len(rows), variant.graph.led[k]
