"""After the fact: what the cache of a compiled model did, and the way to end its runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import NotCompiledError
from ..runtime.dispatch import LIVE, Dispatcher, Instance
from .tables import human_bytes, table


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

    def __str__(self) -> str:
        groups = list(dict.fromkeys([*self.computed, *self.predicted]))
        rows = [(g, self.computed.get(g, 0), self.predicted.get(g, 0), _share(self, g)) for g in groups]
        compiled = ", ".join(f"{name} ({seconds:.1f} s)" for name, seconds in self.variants.items()) or "none"
        return (
            f"{self.method}: {self.steps} steps in {self.runs} runs, contexts: {', '.join(self.contexts) or 'none'}\n"
            + table(("group", "computed", "predicted", "share predicted"), rows)
            + f"cache: {human_bytes(self.cache_bytes)} ({self.cache_bytes} B), variants: {compiled}\n"
        )


def _share(summary: Summary, group: str) -> str:
    predicted, total = summary.predicted.get(group, 0), summary.predicted.get(group, 0) + summary.computed.get(group, 0)
    return f"{100 * predicted / total:.0f} %" if total else "-"


def summary(model: torch.nn.Module | Callable[..., Any]) -> Summary:
    """What the cache of ``model`` (the compiled or the original module) did so far.

    Raises:
        NotCompiledError: No program of ``backend="cached_inductor"`` belongs to the model (yet).
    """
    found = list(programs_of(model))
    if not found:
        raise NotCompiledError(
            f"no cached_inductor program belongs to this {type(_original(model)).__name__}",
            where="summary", hint='call the model compiled with backend="cached_inductor" and a cache at least once',
        )  # fmt: skip
    computed: dict[str, int] = {}
    predicted: dict[str, int] = {}
    variants: dict[str, float] = {}
    for dispatcher, instance in found:
        for total, part in ((computed, instance.computed), (predicted, instance.predicted)):
            for group, count in part.items():
                total[group] = total.get(group, 0) + count
        if dispatcher.program is not None:
            for name, variant in dispatcher.program.variants.items():
                variants[name] = variants.get(name, 0.0) + variant.compile_seconds
    states = [state for _, instance in found for state in instance.states.values()]
    dispatchers = {id(d): d for d, _ in found}.values()
    return Summary(
        method=type(found[0][0].method.config).__name__,
        computed=computed,
        predicted=predicted,
        cache_bytes=sum(state.cache_bytes for state in states),
        planned_bytes=sum(d.program.plan.cache_bytes for d in dispatchers if d.program is not None),
        variants=variants,
        runs=sum(instance.runs for _, instance in found),
        steps=sum(instance.steps for _, instance in found),
        contexts=tuple(dict.fromkeys(state.context for state in states)),
        graphs=len(dispatchers),
    )


def reset(model: torch.nn.Module | Callable[..., Any] | None = None) -> None:
    """End the current run: the next call of ``model`` is step 0 of a new one, in every context.

    ``model`` is the compiled or the original module; None: every model compiled with ``cached_inductor``. Without a
    program (nothing was called yet) there is nothing to end.
    """
    if model is None:
        found = [(d, instance) for d in list(LIVE) for instance in list(d.instances.values())]
    else:
        found = list(programs_of(model))
    for dispatcher, instance in found:
        dispatcher.reset(instance)


def _original(model: object) -> object:
    """The module behind a compiled module or function."""
    model = getattr(model, "_orig_mod", model)
    original = getattr(model, "_torchdynamo_orig_callable", model)
    return getattr(original, "__self__", original)


def programs_of(model: object) -> Iterator[tuple[Dispatcher, Instance]]:
    module = _original(model)
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"expected a module or a compiled module, got {type(model).__name__}")
    for dispatcher in list(LIVE):
        for instance in dispatcher.belongs_to(module):
            yield dispatcher, instance
