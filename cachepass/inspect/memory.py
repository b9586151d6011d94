"""Memory: what a model keeps from step to step at this moment, and for whom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..run.live import programs_of
from .tables import human_bytes, table


@dataclass(frozen=True)
class Memory:
    """Bytes that a model keeps.

    Attributes:
        held: In all. Of runs that are over it waits for the next ones.
        limit: The most that may be held (``max_cache_bytes``); None: nothing was kept yet.
        contexts: By context: the histories of cuts and of guidance, and what is kept for a run.
        pool_bytes: Of the pools of requests that are called as rows, places that nobody has included.
        places: How many of their places are taken, and how many there are.
    """

    held: int
    limit: int | None
    contexts: dict[str, tuple[int, int]]
    pool_bytes: int = 0
    places: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        most = "" if self.limit is None else f" of at most {human_bytes(self.limit)}"
        if self.places[1]:
            most += f"; pools: {human_bytes(self.pool_bytes)}, {self.places[0]} of {self.places[1]} places taken"
        rows = [(name, human_bytes(history), human_bytes(kept)) for name, (history, kept) in self.contexts.items()]
        listed = table(("context", "histories", "kept for a run"), rows) if rows else ""
        return f"held: {human_bytes(self.held)}{most}\n{listed}"


def memory(model: torch.nn.Module | Callable[..., Any]) -> Memory:
    """What ``model`` (the compiled or the original module, or a pipeline) keeps now, over all of its configs.

    Nothing is waited for, so a server may ask in every request.
    """
    models = list(dict.fromkeys(instance.model for _, instance in programs_of(model)))
    contexts: dict[str, tuple[int, int]] = {}
    for run in [run for record in models for run in record.runs]:
        histories, kept = run.history_bytes, run.cache_bytes - run.history_bytes
        if histories + kept:
            before = contexts.get(run.context, (0, 0))
            contexts[run.context] = before[0] + histories, before[1] + kept
    limits = [record.room.limit for record in models if record.room.limit is not None]
    pools = [pool for record in models for pool in record.pools.all]
    places = sum(pool.taken for pool in pools), sum(pool.seats for pool in pools)
    held = sum(a + b for a, b in contexts.values())
    pool_bytes = sum(pool.pool_bytes for pool in pools)
    return Memory(held, sum(limits) if limits else None, contexts, pool_bytes, places)
