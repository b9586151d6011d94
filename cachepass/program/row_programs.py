"""Row programs: the variants of a program, compiled for several requests at once.

There is one for each phase and each number of rows (``options["row_sizes"]``), compiled when a call first needs it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from ..errors import RowsError
from ..recipe.vocabulary import Route
from .adopt import Adoption
from .lower import as_it_is, ready_of
from .over_rows import over_rows
from .phases import Phase
from .plan import CachePlan
from .progress import compiling
from .row_variant import RowGraph, RowRunnable, RowVariant
from .runnable import LoweredVariant, decision_name
from .specialize import Variant
from .trace import Traced

logger = logging.getLogger(__name__)


class Source(Protocol):
    """What is asked of the program of one request."""

    plan: CachePlan
    lowering: str
    shares: bool
    shows_progress: bool
    variants: dict[str, LoweredVariant]

    def variant(self, phase: Phase) -> Variant: ...
    def decision(self, route: Route) -> Variant: ...
    def traced(self, route: Route) -> Traced: ...


class RowPrograms(RowRunnable):
    """The programs for rows of one program, with the inputs that differ from row to row.

    Attributes:
        differ: Indices of these, among the model's own.
        seats: How many requests its pools have room for.
    """

    def __init__(self, program: Source, differ: frozenset[int], seats: int) -> None:
        self.program, self.differ, self.seats = program, differ, seats
        self._known: dict[tuple[object, ...], RowVariant] = {}
        self._lock = threading.RLock()

    def compile(self, phase: Phase, rows: int) -> RowVariant:
        """The program of a phase for so many rows.

        Raises:
            RowsError: An operation of the model cannot be done on rows.
        """
        return self._compile((phase, rows), lambda: self.program.variant(phase), phase.route, rows)

    def compile_decision(self, route: Route, rows: int) -> RowVariant:
        """The program up to the decision of a route."""
        key = decision_name(route), rows
        return self._compile(key, lambda: self.program.decision(route), route, rows)

    def _compile(self, key: tuple[object, ...], make: Callable[[], Variant], route: Route, rows: int) -> RowVariant:
        known = self._known.get(key)
        if known is not None:
            return known
        with self._lock:
            if key not in self._known:
                self._known[key] = self._lower(make(), self.program.traced(route), rows)
            return self._known[key]

    def _lower(self, variant: Variant, traced: Traced, rows: int) -> RowVariant:
        start, program = time.perf_counter(), self.program
        name = f"{variant.name} x {rows}"
        with compiling(f"compiling {name}", shown=program.shows_progress):
            graph = self.graph(variant, traced, rows)
            if program.lowering == "eager":
                run = as_it_is(graph.gm)
            else:
                ready = ready_of(
                    Adoption(graph.gm, ()), graph.inputs, _static(graph), is_own=True, shares=program.shares
                )
                run = ready.lower(traced.context, cudagraphs=variant.repeated)
        nodes = sum(node.op not in ("placeholder", "output") for node in graph.gm.graph.nodes)
        seconds = time.perf_counter() - start
        logger.info("variant %s: %d nodes, %.2f s", name, nodes, seconds)
        program.variants[name] = LoweredVariant.of(name, run, (), variant.kept, seconds, nodes=nodes)
        return RowVariant(run, graph, variant.kept)

    def graph(self, variant: Variant, traced: Traced, rows: int) -> RowGraph:
        """The graph of a variant for so many rows.

        Raises:
            RowsError: An operation of the model cannot be done on rows.
        """
        try:
            return over_rows(variant, traced.inputs, self.differ, rows, self.program.plan, self.seats)
        except NotImplementedError as error:
            raise RowsError(
                f"the model cannot be run on several rows at once: {error}",
                where="cachepass.rows",
                hint="call it once for each request, in a cachepass.cache_context of its own",
            ) from error


def _static(graph: RowGraph) -> list[int]:
    """Inputs that stay where they are: the pools. (The model's own are known to Inductor.)"""
    end = len(graph.inputs) - bool(graph.pages)
    return list(range(end - len(graph.pools), end))
