"""Row variants: what a step of several requests asks of a program, however it was made.

Nothing here compiles, as in ``runnable.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...recipe.vocabulary import Route
from ..once import Invariants, Once
from ..phases import Phase
from ..roles import Carried, Parameters, Role, Weights
from .pools import Page, PoolKey


@dataclass(frozen=True)
class RowGraph:
    """The graph of a variant for several rows.

    Attributes:
        gm: It takes the model's own inputs, those that differ with rows in front; then ``shared``; then ``scalars`` and
            ``carried``, with rows in front; then the pools; then the page numbers, ``[len(pages), R]``, if there are.
        inputs: As fake tensors and numbers.
        shared: What is kept for all requests, by name.
        scalars: Weights and parameters.
        carried: What the program up to the decision computed.
        pools: What requests keep.
        pages: What the rows of the last input are.
        led: For each result, whether it has rows in front.
    """

    gm: fx.GraphModule
    inputs: tuple[Any, ...]
    shared: tuple[str, ...]
    scalars: tuple[Weights | Parameters, ...]
    carried: tuple[Carried, ...]
    pools: tuple[PoolKey, ...]
    pages: tuple[Page, ...]
    led: tuple[bool, ...]


@dataclass(frozen=True)
class RowVariant:
    """A variant for so many rows that can run.

    Attributes:
        run: It takes its inputs as one list, in the order that ``graph`` says, and returns a list.
        graph: What it takes, and what of its results has rows in front.
        kept: What the last of its results are; the others are the model's.
    """

    run: Callable[[list[Any]], Any]
    graph: RowGraph
    kept: tuple[Role, ...]


@dataclass(frozen=True, eq=False)
class KeptOnce:
    """What is kept for a run, and the program that computes it, of one request's inputs."""

    kept: Invariants
    once: Once


class RowRunnable(ABC):
    """A model's programs for several requests.

    Attributes:
        differ: Indices of the model's own inputs that differ from row to row.
    """

    differ: frozenset[int]

    @abstractmethod
    def compile(self, phase: Phase, rows: int) -> RowVariant:
        """The program of a phase for so many rows."""

    @abstractmethod
    def shared_once(self, route: Route) -> KeptOnce | None:
        """What a route keeps for all requests, if anything: the same object each time."""

    @abstractmethod
    def own_once(self, route: Route) -> KeptOnce | None:
        """What each request keeps for its run on a route, if anything: the same object each time."""

    @abstractmethod
    def compile_decision(self, route: Route, rows: int) -> RowVariant:
        """The program up to the decision of a route, which splits, for so many rows."""


def parts_of(count: int, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """So many rows in calls of these sizes, the largest first: where each begins and ends."""
    start = 0
    while start < count:
        size = max(size for size in sizes if size <= count - start)
        yield start, start + size
        start += size


def is_fit(tensor: torch.Tensor, strides: Sequence[int]) -> bool:
    """A tensor has these strides; those of dimensions of one element do not matter."""
    known = zip(tensor.stride(), strides, tensor.shape, strict=True)
    return all(own == wanted or size == 1 for own, wanted, size in known)
