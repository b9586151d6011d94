"""After the fact: what the cache of a compiled model did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import NotCompiledError
from ..options import CompileOptions
from ..program.flops import add_known
from ..program.phases import Phase
from ..program.runnable import Runnable
from ..recipe.vocabulary import PLAIN
from ..run.dispatch import LIVE, Dispatcher
from ..run.instance import Instance
from ..run.live import options_of, original_of, programs_of
from ..run.model import Model
from ..run.runs import Run
from .tables import human_bytes, human_flops, table


@dataclass(frozen=True)
class Summary:
    """What the cache of one model did so far.

    Attributes:
        config: The method, and what of it differs from its defaults: ``"taylorseer(cache_interval=3)"``.
        others: The same of other configs that this module is compiled with, too.
        method: The method's config class name.
        computed, predicted: Steps per group, over all contexts and runs.
        cache_bytes: Bytes of all slots that are allocated now, over all contexts.
        planned_bytes: Bytes that the plan gives to one context.
        variants: Compile seconds of each program, by phase.
        capture_seconds: Of tracing the model, by Dynamo and AOTAutograd, before any of them.
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

    config: str
    others: tuple[str, ...]
    method: str
    computed: dict[str, int]
    predicted: dict[str, int]
    cache_bytes: int
    planned_bytes: int
    variants: dict[str, float]
    capture_seconds: float
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

    @property
    def compile_seconds(self) -> float:
        """Seconds that all compiling took."""
        return self.capture_seconds + sum(self.variants.values())

    def __str__(self) -> str:
        compiled = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.variants.items()) or "no program"
        lines = [
            f"{self.config}: {self.steps} steps in {self.runs} runs, contexts: {', '.join(self.contexts) or 'none'}",
            *self._table(),
            f"cache: {human_bytes(self.cache_bytes)} ({self.cache_bytes} B)",
            f"compiled in {self.compile_seconds:.1f} s: capture {self.capture_seconds:.1f} s, {compiled}",
        ]
        if self.invariant_bytes:
            lines.append(f"kept for a run: {human_bytes(self.invariant_bytes)}")
        if self.max_bytes is not None:
            lines.append(f"held in all: {human_bytes(self.held_bytes)} of at most {human_bytes(self.max_bytes)}")
        if self.saved is None:
            lines.append("compute: unknown: sizes depend on data")
        elif self.plain_flops:
            taken, plain = human_flops(self.flops), human_flops(self.plain_flops)
            lines.append(f"compute: {taken} of {plain}, {100 * self.saved:.0f} % saved")
        lines += [f"warning: {message}" for message in self.warnings]
        if self.others:
            lines.append(f"compiled as well: {', '.join(self.others)} (summary(compiled) tells of one)")
        return "\n".join(lines) + "\n"

    def _table(self) -> list[str]:
        """A line for each context and group."""
        columns = ("context", "group", "computed", "predicted", "share predicted", "last run")
        rows = []
        for context, groups in self.by_context.items():
            for group, (computed, predicted) in groups.items():
                share = f"{100 * predicted / (computed + predicted):.0f} %"
                rows.append(
                    (context, group, computed, predicted, share, self.last_runs.get(context, {}).get(group, ""))
                )
        return [table(columns, rows).rstrip("\n")] if rows else []


def summary(model: torch.nn.Module | Callable[..., Any]) -> Summary:
    """What the cache of ``model`` (the compiled or the original module) did so far.

    A module may be compiled several times, with other options: a compiled one tells of itself, the original one of
    what was called last.

    Raises:
        NotCompiledError: No program of ``backend="cached_inductor"`` belongs to the model (yet).
        NoMatchError: The model is many graphs, and nothing in any of them is cached.
    """
    found, others = _of_one_config(model)
    programs = [d.program for d, _ in found if d.program is not None]
    dispatchers = list(dict.fromkeys(d for d, _ in found))
    models = list(dict.fromkeys(instance.model for _, instance in found))
    for record in models:
        record.settle()
    runs = [run for record in models for run in record.runs if run.call is not None]
    parts = [d for d in list(LIVE) if d.instances.captured_in in models]
    owners = (*dispatchers, *dict.fromkeys(programs), *models)
    flops, plain_flops = _flops(found)
    return Summary(
        **_steps(models, runs),
        **_bytes(models, runs),
        config=dispatchers[0].method.config.label,
        others=others,
        method=type(dispatchers[0].method.config).__name__,
        variants=_compile_seconds(dict.fromkeys(programs)),
        capture_seconds=sum(dispatcher.capture_seconds for dispatcher in dispatchers),
        graphs=len(dict.fromkeys([*dispatchers, *parts])),
        modules=tuple(dict.fromkeys(path for d, instance in found for path in d.modules(instance))),
        once=tuple(dict.fromkeys(path for program in programs for path in program.computed_once)),
        flops=flops,
        plain_flops=plain_flops,
        warnings=tuple(dict.fromkeys(message for owner in owners for message in owner.warnings)),
    )


Found = Sequence[tuple[Dispatcher, Instance]]


def _of_one_config(model: object) -> tuple[Found, tuple[str, ...]]:
    """The graphs that a model was captured in with its own options or, where it has none of its own, with those that
    it was called with last; and the labels of its other configs."""
    found, module = list(programs_of(model)), original_of(model)
    by_options: list[tuple[CompileOptions, list[tuple[Dispatcher, Instance]]]] = []
    for dispatcher, instance in found:
        same = next((own for options, own in by_options if options == dispatcher.options), None)
        if same is None:
            by_options.append((dispatcher.options, same := []))
        same.append((dispatcher, instance))
    by_options.sort(key=lambda item: max((run.stamp for _, i in item[1] for run in i.model.runs), default=0))
    given = options_of(model)
    chosen = by_options[-1:] if given is None else [item for item in by_options if item[0] == given]
    if not chosen:
        for dispatcher in list(LIVE):
            record = dispatcher.instances.captured_in
            if record is not None and record.module is module:
                record.require_match()
        raise NotCompiledError(
            f"no cached_inductor program belongs to this {type(module).__name__}",
            where="summary",
            hint='call the model compiled with backend="cached_inductor" and a cache at least once',
        )
    others = [options.cache.label for options, _ in by_options if options != chosen[0][0] and options.cache is not None]
    return chosen[0][1], tuple(others)


def _steps(models: Sequence[Model], runs: Sequence[Run]) -> dict[str, Any]:
    """What was done in which steps."""
    computed: _Counts = sum((m.counts.computed for m in models), Counter())
    predicted: _Counts = sum((m.counts.predicted for m in models), Counter())
    latest = sorted(runs, key=lambda run: run.stamp)
    return {
        "computed": _by_group(computed),
        "predicted": _by_group(predicted),
        "runs": sum(record.counts.runs for record in models),
        "steps": sum(record.counts.steps for record in models),
        "contexts": tuple(dict.fromkeys(run.context for run in runs)),
        "by_context": _by_context(computed, predicted, [run.context for run in runs]),
        "last_runs": {run.context: run.marks() for run in latest},
        "distances": {run.context: tuple(run.distances) for run in latest if set(run.distances) - {None}},
    }


def _bytes(models: Sequence[Model], runs: Sequence[Run]) -> dict[str, Any]:
    """What is kept, and what would be."""
    cuts = {key: state for run in runs for key, state in run.states.items()}
    outputs = {slots: state for run in runs for slots, state in run.outputs.items()}
    return {
        "cache_bytes": sum(run.history_bytes for run in runs),
        "planned_bytes": sum(s.planned_bytes for s in cuts.values()) + sum(s.plan.slot_bytes for s in outputs.values()),
        "invariant_bytes": sum(run.cache_bytes - run.history_bytes for run in runs),
        "held_bytes": sum(run.cache_bytes for run in runs),
        "max_bytes": max((m.room.limit for m in models if m.room.limit is not None), default=None),
    }


def _compile_seconds(programs: Iterable[Runnable]) -> dict[str, float]:
    """Compile seconds by phase, over all graphs."""
    seconds: dict[str, float] = {}
    for program in programs:
        for name, variant in program.variants.items():
            seconds[name] = seconds.get(name, 0.0) + variant.compile_seconds
    return seconds


def _flops(found: Iterable[tuple[Dispatcher, Instance]]) -> tuple[int | None, int | None]:
    """What all calls took, and would have taken without a cache; None: unknown."""
    taken: int | None = 0
    plain: int | None = 0
    for dispatcher, instance in found:
        program = dispatcher.program
        if program is not None and instance.phases:
            whole = add_known(program.flops(Phase(route=PLAIN)), program.flops_once())
            for phase, calls in instance.phases.items():
                taken = add_known(taken, _times(calls, program.flops(phase)))
                plain = add_known(plain, _times(calls, whole))
            for route, times in instance.once.items():
                taken = add_known(taken, _times(times, program.flops_once(route)))
    return taken, plain


def _times(calls: int, flops: int | None) -> int | None:
    return None if flops is None else calls * flops


_Counts = Counter[tuple[str, str]]  # by context and group


def _by_group(counts: _Counts) -> dict[str, int]:
    groups: dict[str, int] = {}
    for (_, group), number in counts.items():
        groups[group] = groups.get(group, 0) + number
    return groups


def _by_context(computed: _Counts, predicted: _Counts, order: Iterable[str]) -> dict[str, dict[str, tuple[int, int]]]:
    """Steps by context and group, in the order in which the contexts were first called."""
    keys = dict.fromkeys([*computed, *predicted])
    contexts = dict.fromkeys([*order, *(context for context, _ in keys)])
    groups = {name: [group for context, group in keys if context == name] for name in contexts}
    return {
        name: {group: (computed[name, group], predicted[name, group]) for group in found}
        for name, found in groups.items()
        if found
    }
