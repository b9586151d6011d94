"""Listings: a variant of an exported model as a list of calls of compiled programs, one after the other.

A block that repeats is one program that is called several times. Values have numbers: the variant's inputs come first,
and every result of a call gets the next one.

    program compute 4          (x, w0, w1, slot: 0 to 3)
    call compute.block 0 1 -> 4
    call compute.block 4 2 -> 5
    copy 4 3
    results 5
    end
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..recipe.value import Value

Program = Callable[[list[Any]], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Call(Value):
    """A program is called with values, and gives others."""

    program: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class View(Value):
    """``result`` is a part of the memory of ``source``, which begins ``offset`` elements behind it."""

    source: int
    result: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Copy(Value):
    """The elements of ``source`` are written to ``target``, a slot."""

    source: int
    target: int


@dataclass(frozen=True)
class Listing(Value):
    """What runs in a phase.

    Attributes:
        name: Of the variant.
        inputs: Number of values that it is given: the model's own, then those of its roles.
        steps: What is done with them, in order.
        results: What it returns.
        adopting: Inputs (slots) that take over the memory of the last results.
    """

    name: str
    inputs: int
    steps: tuple[Call | View | Copy, ...]
    results: tuple[int, ...]
    adopting: tuple[int, ...] = ()

    @property
    def calls(self) -> tuple[Call, ...]:
        return tuple(step for step in self.steps if isinstance(step, Call))

    def lines(self) -> Iterator[str]:
        """The listing as text (``timetable.py``)."""
        yield f"program {self.name} {self.inputs}"
        for step in self.steps:
            if isinstance(step, Call):
                yield f"call {step.program} {numbers_of(step.inputs)}-> {numbers_of(step.outputs)}".rstrip()
            elif isinstance(step, View):
                shape, stride = numbers_of(step.shape), numbers_of(step.stride)
                yield f"view {step.source} {step.result} {shape}| {stride}| {step.offset}"
            else:
                yield f"copy {step.source} {step.target}"
        yield f"results {numbers_of(self.results)}".rstrip()
        if self.adopting:
            yield f"adopting {numbers_of(self.adopting)}".rstrip()
        yield "end"

    def linked(self, programs: Mapping[str, Program]) -> Callable[[list[Any]], list[Any]]:
        """The listing as a callable, which takes its inputs as one list and empties it."""
        size = 1 + max((n for step in self.steps for n in _written(step)), default=self.inputs - 1)
        room: list[Any] = [None] * (size - self.inputs)
        last = {n: i for i, step in enumerate(self.steps) for n in _read(step)}
        last = {n: i for n, i in last.items() if n >= self.inputs and n not in self.results}
        steps = [_linked(step, programs, tuple(n for n in last if last[n] == i)) for i, step in enumerate(self.steps)]
        results = self.results

        def run(given: list[Any]) -> list[Any]:
            values = [*given, *room]
            given.clear()
            for step in steps:
                step(values)
            return [values[n] for n in results]

        return run


def numbers_of(values: Sequence[object]) -> str:
    """Numbers in a line, a space behind each."""
    return "".join(f"{value} " for value in values)


def _read(step: Call | View | Copy) -> tuple[int, ...]:
    if isinstance(step, Call):
        return step.inputs
    return (step.source,) if isinstance(step, View) else (step.source, step.target)


def _written(step: Call | View | Copy) -> tuple[int, ...]:
    if isinstance(step, Call):
        return step.outputs
    return (step.result,) if isinstance(step, View) else ()


def _linked(
    step: Call | View | Copy, programs: Mapping[str, Program], over: tuple[int, ...]
) -> Callable[[list[Any]], None]:
    """A step on the list of all values; ``over``: values that nobody reads behind it."""
    if isinstance(step, Call):
        return _linked_call(step, programs[step.program], over)
    if isinstance(step, View):
        return _linked_view(step, over)

    def copy(values: list[Any]) -> None:
        values[step.target].copy_(values[step.source])
        for n in over:
            values[n] = None

    return copy


def _linked_call(step: Call, program: Program, over: tuple[int, ...]) -> Callable[[list[Any]], None]:
    outputs, inputs = step.outputs, step.inputs
    pick: Any = operator.itemgetter(*inputs) if len(inputs) > 1 else lambda values: [values[n] for n in inputs]

    def call(values: list[Any]) -> None:
        given = list(pick(values))
        for n in over:
            values[n] = None
        for n, value in zip(outputs, program(given), strict=True):
            values[n] = value

    return call


def _linked_view(step: View, over: tuple[int, ...]) -> Callable[[list[Any]], None]:
    def view(values: list[Any]) -> None:
        source: torch.Tensor = values[step.source]
        values[step.result] = source.as_strided(step.shape, step.stride, source.storage_offset() + step.offset)
        for n in over:
            values[n] = None

    return view
