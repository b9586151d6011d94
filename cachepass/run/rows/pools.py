"""Pools: those of one model, for each size of its latents, within what it may keep."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

import torch

from ...errors import PoolError
from ..room import Room
from .pool import Pool


class Pools:
    """The pools of one model. Where a new one has no room, those of other sizes go in which no request has a place."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._known: dict[Hashable, Pool] = {}
        self._lock = threading.RLock()

    def at(self, place: Hashable, make: Callable[[], Pool]) -> Pool:
        """The pool for what a graph keeps at one size, which may be new."""
        with self._lock:
            if place not in self._known:
                self._known[place] = make()
            else:
                self._known[place] = self._known.pop(place)  # the one used last stands last
            return self._known[place]

    @property
    def all(self) -> list[Pool]:
        """Those of all sizes."""
        with self._lock:
            return list(self._known.values())

    def reserve(self, needed: int, seats: int, device: torch.device) -> None:
        """A pool for so many requests is about to take so many bytes more.

        Raises:
            PoolError: It is more than may be kept.
        """
        limit = self._room.limit_on(device)
        with self._lock:
            for place, pool in list(self._known.items()):
                if self._room.pools + needed <= limit:
                    break
                if not pool.taken:
                    del self._known[place]
                    self._room.pools -= pool.planned_bytes
            left = limit - self._room.pools
            if needed > left:
                raise PoolError(
                    f"a pool for {seats} requests takes {needed} bytes, and no more than {left} may be kept",
                    where='options["pool_requests"]',
                    hint='give fewer, or options["max_cache_bytes"] more',
                )
            self._room.pools += needed

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._known.clear()
            self._room.pools = 0
