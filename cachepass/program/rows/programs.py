"""Row programs: the variants of a program, compiled for several requests at once.

There is one for each phase and each number of rows (``options["row_sizes"]``), compiled when a call first needs it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from ...errors import RowsError
from ...recipe.vocabulary import Route
from ..adopt import Adoption
from ..lower import as_it_is, lower, ready_of
from ..phases import Phase
from ..plan import CachePlan
from ..progress import compiling
from ..runnable import Invariants, LoweredVariant, Once, decision_name
from ..sizes import SymbolBinder
from ..specialize import Variant
from ..trace import Traced
from .graph import over_rows
from .once import Sorted, in_every_step, part_of, sort_kept
from .variant import KeptOnce, RowGraph, RowRunnable, RowVariant

logger = logging.getLogger(__name__)


class Source(Protocol):
    """What is asked of the program of one request."""

    plan: CachePlan
    lowering: str
    shares: bool
    shows_progress: bool
    variants: dict[str, LoweredVariant]

    def variant(self, phase: Phase) -> Variant: ...
    def invariants(self, route: Route) -> Invariants | None: ...
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
        self._once: dict[tuple[Traced, bool], KeptOnce | None] = {}
        self._sorted: dict[Traced, Sorted] = {}
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

    def shared_once(self, route: Route) -> KeptOnce | None:
        return self._kept_once(route, shared=True)

    def own_once(self, route: Route) -> KeptOnce | None:
        return self._kept_once(route, shared=False)

    def _kept_once(self, route: Route, *, shared: bool) -> KeptOnce | None:
        traced, kept = self.program.traced(route), self.program.invariants(route)
        if kept is None:
            return None
        key = traced, shared
        with self._lock:
            if key not in self._once:
                kinds = self._kinds(traced)
                part = part_of(traced, kept, kinds.shared if shared else kinds.own, self.differ)
                self._once[key] = None if part is None else self._lower_once(traced, *part)
            return self._once[key]

    def _lower_once(self, traced: Traced, kept: Invariants, variant: Variant) -> KeptOnce:
        program = self.program
        lowered = lower(variant, traced.inputs, program.lowering, traced.context, shares=program.shares)
        values = [node.meta.get("val") for node in variant.gm.graph.find_nodes(op="placeholder")]
        sizes = [size for slot in kept.slots for size in (*slot.shape, *slot.stride)]
        return KeptOnce(kept, Once(lowered.run, SymbolBinder.of(values[: len(traced.inputs)], sizes)))

    def _kinds(self, traced: Traced) -> Sorted:
        if traced not in self._sorted:
            self._sorted[traced] = sort_kept(traced, self.differ)
        return self._sorted[traced]

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
        kinds = self._kinds(traced)
        whole = in_every_step(variant, traced, kinds.every_step)
        try:
            return over_rows(whole, traced.inputs, self.differ, rows, self.program.plan, self.seats, kinds.shared)
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
