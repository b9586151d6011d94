"""After the fact: what the cache of a compiled model did."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import NotCompiledError
from ..program.flops import add_known
from ..program.plan import Phase
from ..recipe.vocabulary import PLAIN
from ..run.dispatch import LIVE, Dispatcher
from ..run.instance import Instance
from ..run.live import original_of, programs_of
from .tables import human_bytes, human_flops, table


@dataclass(frozen=True)
class Summary:
    """What the cache of one model did so far.

    Attributes:
        method: The method's config class name.
        computed, predicted: Steps per group, over all contexts and runs.
        cache_bytes: Bytes of all slots that are allocated now, over all contexts.
        planned_bytes: Bytes that the plan gives to one context.
        variants: Compile seconds of each program, by phase.
        runs: Runs begun, over all contexts.
        steps: Calls that succeeded.
        contexts: Contexts that hold a state.
        graphs: Graphs that the model was captured in.
        modules: Paths of the modules that are cut.
        once: Paths of those that would be cut, and are computed once per run: their inputs stay the same in it.
        invariant_bytes: Bytes of all that is kept for a run, over all contexts.
        held_bytes: Bytes of both, runs that are over included: their memory waits for the next ones.
        max_bytes: The most that may be held (``max_cache_bytes``); None: nothing was kept yet.
        flops: What all calls took in matrix products, convolutions and attentions, estimated from shapes. None:
            unknown, because sizes depend on data.
        plain_flops: What they would have taken without a cache.
        warnings: All that were given for this model.
        by_context: Steps computed and predicted, by context and group.
        last_runs: What each group did in each step of a context's last run: ``"##..#"``, # computed, . predicted.
        distances: What the probe measured in each step of a context's last run, for methods that decide by it; None:
            it was not asked.
    """

    method: str
    computed: dict[str, int]
    predicted: dict[str, int]
    cache_bytes: int
    planned_bytes: int
    variants: dict[str, float]
    runs: int
    steps: int
    contexts: tuple[str, ...]
    graphs: int
    modules: tuple[str, ...] = ()
    once: tuple[str, ...] = ()
    invariant_bytes: int = 0
    held_bytes: int = 0
    max_bytes: int | None = None
    flops: int | None = 0
    plain_flops: int | None = 0
    warnings: tuple[str, ...] = ()
    by_context: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    last_runs: dict[str, dict[str, str]] = field(default_factory=dict)
    distances: dict[str, tuple[float | None, ...]] = field(default_factory=dict)

    @property
    def saved(self) -> float | None:
        """Share of FLOPs that caching saved, 0 to 1; None: unknown."""
        if self.flops is None or self.plain_flops is None:
            return None
        return 1 - self.flops / self.plain_flops if self.plain_flops else 0.0

    def __str__(self) -> str:
        rows = [
            (
                context,
                group,
                computed,
                predicted,
                f"{100 * predicted / (computed + predicted):.0f} %",
                self.last_runs.get(context, {}).get(group, ""),
            )
            for context, groups in self.by_context.items()
            for group, (computed, predicted) in groups.items()
        ]
        compiled = ", ".join(f"{name} ({seconds:.1f} s)" for name, seconds in self.variants.items()) or "none"
        saved = "unknown: sizes depend on data"
        if self.saved is not None:
            saved = f"{human_flops(self.flops)} of {human_flops(self.plain_flops)}, {100 * self.saved:.0f} % saved"
        columns = ("context", "group", "computed", "predicted", "share predicted", "last run")
        return (
            f"{self.method}: {self.steps} steps in {self.runs} runs, contexts: {', '.join(self.contexts) or 'none'}\n"
            + (table(columns, rows) if rows else "")
            + f"cache: {human_bytes(self.cache_bytes)} ({self.cache_bytes} B), variants: {compiled}\n"
            + (f"kept for a run: {human_bytes(self.invariant_bytes)}\n" if self.invariant_bytes else "")
            + (f"held in all: {human_bytes(self.held_bytes)} of at most {human_bytes(self.max_bytes)}\n"
               if self.max_bytes is not None else "")
            + (f"compute: {saved}\n" if self.plain_flops != 0 else "")
            + "".join(f"warning: {message}\n" for message in self.warnings)
        )  # fmt: skip


def summary(model: torch.nn.Module | Callable[..., Any]) -> Summary:
    """What the cache of ``model`` (the compiled or the original module) did so far.

    Raises:
        NotCompiledError: No program of ``backend="cached_inductor"`` belongs to the model (yet).
        NoMatchError: The model is many graphs, and nothing in any of them is cached.
    """
    found = list(programs_of(model))
    if not found:
        for dispatcher in list(LIVE):
            if dispatcher.part is not None and dispatcher.part.model.module is original_of(model):
                dispatcher.part.model.require_match()
        raise NotCompiledError(
            f"no cached_inductor program belongs to this {type(original_of(model)).__name__}",
            where="summary", hint='call the model compiled with backend="cached_inductor" and a cache at least once',
        )  # fmt: skip
    variants: dict[str, float] = {}
    dispatchers = list(dict.fromkeys(dispatcher for dispatcher, _ in found))
    for dispatcher in dispatchers:
        for name, variant in ({} if dispatcher.program is None else dispatcher.program.variants).items():
            variants[name] = variants.get(name, 0.0) + variant.compile_seconds
    models = list(dict.fromkeys(instance.model for _, instance in found))
    for record in models:
        record.settle()
    runs = [run for record in models for run in record.runs if run.call is not None]
    cuts = {key: state for run in runs for key, state in run.states.items()}
    outputs = {slots: state for run in runs for slots, state in run.outputs.items()}
    computed, predicted = _total(m.computed for m in models), _total(m.predicted for m in models)
    flops, plain_flops = _flops(found)
    return Summary(
        method=type(found[0][0].method.config).__name__,
        computed=_by_group(computed),
        predicted=_by_group(predicted),
        cache_bytes=sum(s.cache_bytes for run in runs for s in (*run.states.values(), *run.outputs.values())),
        planned_bytes=sum(s.planned_bytes for s in cuts.values()) + sum(s.plan.slot_bytes for s in outputs.values()),
        variants=variants,
        runs=sum(record.begun for record in models),
        steps=sum(record.steps for record in models),
        contexts=tuple(dict.fromkeys(run.context for run in runs)),
        graphs=len(dict.fromkeys([*dispatchers, *(d for d in list(LIVE) if d.part and d.part.model in models)])),
        modules=tuple(dict.fromkeys(path for d, instance in found for path in d.modules(instance))),
        once=tuple(
            dict.fromkeys(path for d in dispatchers if d.program is not None for path in d.program.computed_once)
        ),
        invariant_bytes=sum(state.cache_bytes for run in runs for state in run.invariants.values()),
        held_bytes=sum(run.cache_bytes for run in runs),
        max_bytes=max((m.room.limit for m in models if m.room.limit is not None), default=None),
        flops=flops,
        plain_flops=plain_flops,
        warnings=tuple(dict.fromkeys(
            message for owner in (*dispatchers, *(d.program for d in dispatchers if d.program), *models)
            for message in owner.warnings
        )),
        by_context=_by_context(computed, predicted, [run.context for run in runs]),
        last_runs={run.context: run.marks() for run in sorted(runs, key=lambda run: run.stamp)},
        distances={run.context: tuple(run.distances) for run in sorted(runs, key=lambda run: run.stamp)
                   if any(distance is not None for distance in run.distances)},
    )  # fmt: skip


def _flops(found: Iterable[tuple[Dispatcher, Instance]]) -> tuple[int | None, int | None]:
    """What all calls took, and would have taken without a cache; None: unknown."""
    taken: int | None = 0
    plain: int | None = 0
    for dispatcher, instance in found:
        program = dispatcher.program
        if program is not None:
            whole = add_known(program.flops(Phase(route=PLAIN)), program.flops_once())
            for phase, calls in instance.phases.items():
                taken = add_known(taken, _times(calls, program.flops(phase)))
                plain = add_known(plain, _times(calls, whole))
            for route, times in instance.once.items():
                taken = add_known(taken, _times(times, program.flops_once(route)))
    return taken, plain


def _times(calls: int, flops: int | None) -> int | None:
    return None if flops is None else calls * flops


_Counts = dict[tuple[str, str], int]  # by context and group


def _total(counts: Iterable[_Counts]) -> _Counts:
    total: _Counts = {}
    for count in counts:
        for key, number in count.items():
            total[key] = total.get(key, 0) + number
    return total


def _by_group(counts: _Counts) -> dict[str, int]:
    groups: dict[str, int] = {}
    for (_, group), number in counts.items():
        groups[group] = groups.get(group, 0) + number
    return groups


def _by_context(computed: _Counts, predicted: _Counts, order: Iterable[str]) -> dict[str, dict[str, tuple[int, int]]]:
    """In the order in which the contexts were first called."""
    keys = dict.fromkeys([*computed, *predicted])
    contexts = dict.fromkeys([*order, *(context for context, _ in keys)])
    groups = {name: [group for context, group in keys if context == name] for name in contexts}
    return {
        name: {group: (computed.get((name, group), 0), predicted.get((name, group), 0)) for group in found}
        for name, found in groups.items() if found
    }  # fmt: skip
