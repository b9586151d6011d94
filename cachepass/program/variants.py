"""A program: everything that was made of one ATen graph.

Variants are compiled when a step first needs them and then kept. The program knows no schedule and keeps nothing from
step to step: how a call of it runs is told in ``step.py``.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import warn
from ..recipe.vocabulary import WHOLE, Route
from .dump import dump
from .flops import count_flops
from .lower import LoweredVariant, lower
from .phases import Phase
from .plan import CachePlan
from .progress import compiling
from .rewrite import Canonical, rewrite
from .sizes import SymbolBinder
from .specialize import Variant, all_phases, specialize, specialize_rest, up_to_decision
from .state_inputs import role_names, weights_dtype
from .trace import Traced

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Once:
    """The program that computes what is kept for a run, and how the sizes of what it writes are found."""

    run: Callable[[list[Any]], Any]
    binder: SymbolBinder


class Program:
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
        self.full, self.half, self.plan, self.lowering, self.shares = full, half, plan, lowering, shares
        self._progress = progress and lowering != "eager"
        self.on_cuda = any(isinstance(value, torch.Tensor) and value.is_cuda for value in full.inputs)
        self.variants: dict[str, LoweredVariant] = {}
        self.warnings: list[str] = []
        self._restless: set[str] = set()  # inputs that were warned of
        self._canonical: dict[Route, Canonical] = {}
        self._flops: dict[Phase, int | None] = {}
        self._by_phase: dict[tuple[Route, tuple[str, ...]], LoweredVariant] = {}
        self._weights: dict[tuple[object, ...], torch.Tensor] = {}
        devices = {cut.group: cut.device for cut in plan.live_cuts if cut.history}
        self.weights_at = {g: (weights_dtype(plan, g), devices[g]) for g in plan.groups if plan.weighted(g)}
        if plan.output is not None:
            group = plan.output.guidance.group
            self.weights_at[group] = weights_dtype(plan, group), plan.output.slots[0].device
        self._once: dict[Traced, Once] = {}
        self._lock = threading.RLock()

    def flops(self, phase: Phase) -> int | None:
        """FLOPs of one call in a phase; None: unknown."""
        if phase not in self._flops:
            self._flops[phase] = count_flops(self.specialized(phase).gm.graph)
        return self._flops[phase]

    def flops_once(self, route: Route = WHOLE) -> int | None:
        """FLOPs of what is computed once per run."""
        hoisted = self.traced(route).hoisted
        return 0 if hoisted is None else count_flops(hoisted.once.graph)

    @property
    def computed_once(self) -> list[str]:
        """Paths of the modules that would be cut, and are computed once per run."""
        regions = () if self.full.hoisted is None else self.full.hoisted.regions
        return [region.split("@")[0] for region in regions]

    def splits(self, route: Route) -> bool:
        """The host decides in the middle of a call on this route."""
        return self.plan.probe is not None and not self.plan.returns and route.predicts

    def compile_decision(self, route: Route) -> LoweredVariant:
        """The program up to the decision of a route, compiled once."""
        name = _decide(route)
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

    def warn_restless(self, traced: Traced, index: int, *, varies: bool) -> None:
        """An input is another tensor at every step; ``varies``: with other values."""
        placeholder = traced.gm.graph.find_nodes(op="placeholder")[index]
        name = traced.names.get(str(placeholder.name), str(placeholder.name))
        if name not in self._restless:
            self._restless.add(name)
            if varies:
                advice = f'if it is meant to change, say so with options["varying_inputs"] = ["{name}"]'
            else:
                advice = (
                    "its values were the same. Give the same tensor object in all steps of a run, or say that they "
                    f'stay so, with options["invariant_inputs"] = ["{name}"]'
                )
            warn(
                f"the input {name} is another tensor at every step, so what depends on it alone is computed each time: "
                + advice,
                self.warnings,
            )

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
        with self._lock, compiling(what, shown=self._progress):
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
        return up_to_decision(self.canonical(route), _decide(route))

    def once(self, traced: Traced) -> Variant:
        """The graph that computes what is kept for a run, of one that has such values."""
        assert traced.hoisted is not None
        name = "half/once" if traced is self.half else "once"
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

    def device_tensor(
        self, name: str, numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Numbers on the device, made once per set of values: a schedule that repeats copies nothing.

        On an accelerator the copy starts from pinned memory and does not wait for the device.
        """
        key = (name, numbers)
        tensor = self._weights.get(key)
        if tensor is None:
            with torch.inference_mode(False):
                tensor = torch.tensor(numbers, dtype=dtype)
                if device.type == "cuda":
                    tensor = tensor.pin_memory()
                tensor = tensor.to(device, non_blocking=True)
            if len(self._weights) >= 4096:
                self._weights.clear()
            self._weights[key] = tensor
        return tensor


def _decide(route: Route) -> str:
    return "/".join(part for part in (route.name, "decide") if part)


__all__ = ["Once", "Program", "Traced"]
