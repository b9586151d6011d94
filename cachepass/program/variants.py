"""A program: everything that was made of one ATen graph.

Variants are compiled when a step first needs them and then kept. The program knows no schedule and keeps nothing from
step to step: how a call of it runs is told in ``step.py``.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from .. import _torch
from ..errors import RowsError
from ..recipe.vocabulary import WHOLE, Route
from .dump import dump
from .flops import count_flops
from .lower import lower
from .phases import Phase, phase_name
from .plan import CachePlan
from .progress import compiling
from .rewrite import Canonical, rewrite
from .rows.programs import RowPrograms
from .runnable import Invariants, LoweredVariant, Once, Runnable, decision_name, once_name
from .sizes import SymbolBinder
from .specialize import Variant, all_phases, specialize, specialize_rest, up_to_decision
from .state_inputs import role_names
from .trace import Traced

logger = logging.getLogger(__name__)


class Program(Runnable):
    """The variants of one model: of its graph and, where steps may skip half of the batch, of its half-batch graph."""

    def __init__(
        self,
        full: Traced,
        half: Traced | None,
        plan: CachePlan,
        lowering: str,
        *,
        shares: bool = False,
        progress: bool = False,
    ) -> None:
        on_cuda = any(isinstance(value, torch.Tensor) and value.is_cuda for value in full.inputs)
        super().__init__(plan, on_cuda=on_cuda)
        self.full, self.half, self.lowering, self.shares = full, half, lowering, shares
        self.shows_progress = progress and lowering != "eager"
        self._canonical: dict[Route, Canonical] = {}
        self._flops: dict[Phase, int | None] = {}
        self._by_phase: dict[tuple[Route, tuple[str, ...]], LoweredVariant] = {}
        self._once: dict[Traced, Once] = {}
        self._invariants = {traced: _invariants(traced) for traced in (full, half) if traced is not None}
        self._for_rows: dict[tuple[frozenset[int], int], RowPrograms] = {}
        self._lock = threading.RLock()

    def for_rows(self, differ: frozenset[int], seats: int) -> RowPrograms:
        key = differ, seats
        with self._lock:
            if key not in self._for_rows:
                self._refuse_rows()
                self._for_rows[key] = RowPrograms(self, differ, seats)
            return self._for_rows[key]

    def _refuse_rows(self) -> None:
        """Raise a RowsError where the programs are of a kind that has none for rows."""
        plan, reason = self.plan, None
        if self.lowering == "cond":
            reason = 'lowering="cond" decides inside of a program, for one request', 'use lowering="specialize"'
        elif plan.output is not None and plan.output.halved:
            reason = (
                "it was captured for guidance batches, of which steps skip a half",
                "call it in cachepass.cache_context('cond') and then in ('uncond'), inside of the rows",
            )
        elif plan.process_group is not None or any(map(_torch.is_collective, self.full.gm.graph.nodes)):
            reason = "ranks run it together", "run it on one rank, or call it once for each request"
        elif any(cut.sized_by_data for cut in plan.live_cuts):
            reason = "sizes of what is kept depend on data", "call it once for each request"
        if reason is not None:
            raise RowsError(f"this model takes no rows: {reason[0]}", where="cachepass.rows", hint=reason[1])

    def flops(self, phase: Phase) -> int | None:
        if phase not in self._flops:
            self._flops[phase] = count_flops(self.specialized(phase).gm.graph)
        return self._flops[phase]

    def flops_once(self, route: Route = WHOLE) -> int | None:
        hoisted = self.traced(route).hoisted
        return 0 if hoisted is None else count_flops(hoisted.once.graph)

    @property
    def computed_once(self) -> list[str]:
        """Paths of the modules that would be cut, and are computed once per run."""
        regions = () if self.full.hoisted is None else self.full.hoisted.regions
        return [region.split("@")[0] for region in regions]

    def compile_decision(self, route: Route) -> LoweredVariant:
        """The program up to the decision of a route, compiled once."""
        name = decision_name(route)
        with self._lock:
            if name not in self.variants:
                self._lower(self.decision(route), self.traced(route))
            return self.variants[name]

    def compile_once(self, route: Route) -> Once | None:
        """The program that computes what is kept for a run, if a route has one, compiled once."""
        traced = self.traced(route)
        hoisted = traced.hoisted
        with self._lock:
            if hoisted is None or traced in self._once:
                return self._once.get(traced)
            lowered = self._lower(self.once(traced), traced)
            values = [node.meta.get("val") for node in traced.gm.graph.find_nodes(op="placeholder")]
            binder = SymbolBinder.of(values[: len(traced.inputs)], hoisted.sizes)
            self._once[traced] = once = Once(lowered.run, binder)
            return once

    def side_by_side(self) -> AbstractContextManager[None]:
        return _torch.kernels_side_by_side()

    def invariants(self, route: Route) -> Invariants | None:
        return self._invariants[self.traced(route)]

    def input_name(self, route: Route, index: int) -> str:
        traced = self.traced(route)
        placeholder = traced.gm.graph.find_nodes(op="placeholder")[index]
        return traced.names.get(str(placeholder.name), str(placeholder.name))

    def compile(self, phase: Phase) -> LoweredVariant:
        """The lowered variant of a phase, compiled once. The cond lowering has one for all phases of a route."""
        key = phase.route, phase.predicted
        known = self._by_phase.get(key)
        if known is not None:
            return known
        with self._lock:
            if key in self._by_phase:
                return self._by_phase[key]
            start = time.perf_counter()
            variant = self.variant(phase)
            lowered = self.variants.get(variant.name)
            if lowered is None:
                lowered = self._lower(variant, self.traced(phase.route), start)
            self._by_phase[key] = lowered
            return lowered

    def _lower(self, variant: Variant, traced: Traced, start: float | None = None) -> LoweredVariant:
        """``start``: when making the variant began."""
        start = time.perf_counter() if start is None else start
        what = f"compiling {variant.name}, program {len(self.variants) + 1} of at most {self._most}"
        with self._lock, compiling(what, shown=self.shows_progress):
            added = variant.gm.graph.find_nodes(op="placeholder")[len(traced.inputs) :]
            roles = {node.name: role for node, role in zip(added, variant.inputs, strict=True)}
            dump(variant.name, variant.gm.graph, {**traced.names, **role_names(roles, self.plan)})
            lowered = lower(variant, traced.inputs, self.lowering, traced.context, shares=self.shares)
            lowered = dataclasses.replace(lowered, compile_seconds=time.perf_counter() - start)
            logger.info("variant %s: %d nodes, %.2f s", lowered.name, lowered.nodes, lowered.compile_seconds)
            self.variants[variant.name] = lowered
            return lowered

    @property
    def _most(self) -> int:
        """Programs that there may be."""
        phases = len({phase.route for phase in self.plan.phases}) if self.lowering == "cond" else len(self.plan.phases)
        once = sum(traced.hoisted is not None for traced in (self.full, self.half) if traced is not None)
        return phases + once + sum(self.splits(route) for route in {phase.route for phase in self.plan.phases})

    def decision(self, route: Route) -> Variant:
        """The graph that runs before the host decides, on a route where it does."""
        return up_to_decision(self.canonical(route), decision_name(route))

    def once(self, traced: Traced) -> Variant:
        """The graph that computes what is kept for a run, of one that has such values."""
        assert traced.hoisted is not None
        name = once_name(half=traced is self.half)
        return Variant(name, traced.hoisted.once, tuple(traced.hoisted.roles.values()), repeated=False)

    def variant(self, phase: Phase) -> Variant:
        """The graph that runs in a phase, before it is lowered."""
        if self.lowering == "cond" and phase.route.predicts:
            name = "/".join(part for part in (phase.route.name, "cond") if part)
            return all_phases(self.canonical(phase.route), name)
        if self.splits(phase.route):
            return specialize_rest(self.canonical(phase.route), self.plan, phase)
        return self.specialized(phase)

    def specialized(self, phase: Phase) -> Variant:
        """The straight-line graph of a phase."""
        return specialize(self.canonical(phase.route), self.plan, phase)

    def all_variants(self) -> Iterator[tuple[str, Variant, Traced]]:
        """All that there may be, with the graphs that it is made of, and the phase that runs it; of what is computed
        once the phase is empty. What runs up to a decision comes once for each of its phases."""
        for phase in self.plan.phases:
            name, traced = phase_name(phase, self.plan.groups), self.traced(phase.route)
            if self.splits(phase.route):
                yield name, self.decision(phase.route), traced
            yield name, self.variant(phase), traced
        for traced in (self.full, self.half):
            if traced is not None and traced.hoisted is not None:
                yield "", self.once(traced), traced

    def canonical(self, route: Route = WHOLE) -> Canonical:
        """The canonical form of a route."""
        with self._lock:
            if route not in self._canonical:
                traced = self.traced(route)
                invariants = None if traced.hoisted is None else traced.hoisted.roles
                canonical = self._canonical[route] = rewrite(traced.gm, self.plan, route, invariants)
                name = "/".join(part for part in (route.name, "canonical") if part)
                dump(name, canonical.gm.graph, self.names(route))
            return self._canonical[route]

    def names(self, route: Route = WHOLE) -> dict[str, str]:
        """What the inputs of a route's graphs are called in prints."""
        return {**self.traced(route).names, **role_names(self.canonical(route).roles, self.plan)}

    def traced(self, route: Route) -> Traced:
        """The graph that a route runs on."""
        if not route.half:
            return self.full
        assert self.half is not None, "a half-batch route needs the half-batch graph"
        return self.half


def _invariants(traced: Traced) -> Invariants | None:
    hoisted = traced.hoisted
    if hoisted is None:
        return None
    checked = tuple(index for index in hoisted.reads if index not in traced.declared)
    placeholders = hoisted.once.graph.find_nodes(op="placeholder")
    resized = frozenset(i for i in checked if _is_symbolic(placeholders[i].meta.get("val")))
    return Invariants(hoisted.slots, checked, resized, hoisted.regions)


def _is_symbolic(value: object) -> bool:
    sizes = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else ()
    return any(isinstance(size, torch.SymInt) for size in sizes)


__all__ = ["Program", "Traced"]
