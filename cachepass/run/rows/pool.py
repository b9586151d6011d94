"""Pool: the memory of all requests of a model that are called as rows, at one size of its latents.

    with cachepass.rows("req-7", "req-9"): ...      each request takes a seat at its first call
    cachepass.release("req-7")                      its seat is free

A seat is a number; which pages of which tensor it stands for is arithmetic. How many there are is said ahead
(``options["pool_requests"]``), so what is held is known before anything runs, and does not grow.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from ...errors import PoolError
from ...program.once import Invariants
from ...program.plan import PlannedCut
from ...program.rows.pools import PoolKey, pool_strides
from ...program.slots import NamedSlot
from ..invariants import InvariantState
from ..state import Memory


@dataclass(frozen=True)
class _Pages:
    """The pages of one request in one tensor: ``ring`` of this form."""

    ring: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def page_bytes(self) -> int:
        return self.ring * math.prod(self.shape) * self.dtype.itemsize


class Pool:
    """One tensor for each slot, with pages of all requests; made when it is first asked for.

    Attributes:
        seats: How many requests there is room for.
    """

    def __init__(self, seats: int, wait: float, reserve: Callable[[int], None]) -> None:
        """``reserve`` is told of the bytes of whatever is added, and raises if it is too much."""
        self.seats = seats
        self._local = threading.local()
        self._shared: weakref.WeakSet[InvariantState] = weakref.WeakSet()
        self._reserve, self._wait = reserve, wait
        self._pages: dict[PoolKey, _Pages] = {}
        self._tensors: dict[PoolKey, torch.Tensor] = {}
        self._free = list(reversed(range(seats)))
        self._changed = threading.Condition()

    def add(
        self, slots: Mapping[PoolKey, tuple[PlannedCut | NamedSlot, int]], resolve: Callable[[object], int]
    ) -> None:
        """Requests keep these slots, too; of each as many as said.

        Raises:
            PoolError: That is more than may be kept.
        """
        with self._changed:
            new = {key: _pages_of(*slot, resolve) for key, slot in slots.items() if key not in self._pages}
            if new:
                self._reserve(self.seats * sum(pages.page_bytes for pages in new.values()))
                self._pages |= new

    @property
    def planned_bytes(self) -> int:
        """Bytes of all that is kept, by all requests."""
        return self.seats * sum(pages.page_bytes for pages in self._pages.values())

    @property
    def pool_bytes(self) -> int:
        """Bytes of the tensors that are made."""
        shared = sum(state.cache_bytes for state in list(self._shared))
        return shared + sum(tensor.untyped_storage().nbytes() for tensor in self._tensors.values())

    @property
    def taken(self) -> int:
        """Requests that have a seat."""
        return self.seats - len(self._free)

    def tensor(self, key: PoolKey) -> torch.Tensor:
        """The pages of all requests: ``[seats * ring, *slot]``."""
        tensor = self._tensors.get(key)
        if tensor is None:
            with self._changed:
                if key not in self._tensors:
                    self._tensors[key] = self._make(self._pages[key])
                tensor = self._tensors[key]
        return tensor

    def _make(self, pages: _Pages) -> torch.Tensor:
        shape, stride = (self.seats * pages.ring, *pages.shape), pool_strides(pages.shape, pages.stride)
        with torch.inference_mode(False), torch.no_grad():
            return torch.empty_strided(shape, stride, dtype=pages.dtype, device=pages.device).zero_()

    def shared(self, kept: Invariants, *, anew: bool) -> InvariantState:
        """What is kept for all requests together, by each thread that calls: what is computed anew is written into the
        same memory, and another thread's call may be reading. ``anew``: nothing that was kept before holds."""
        states: dict[Invariants, InvariantState] = self._local.__dict__.setdefault("shared", {})
        if anew or kept not in states:
            states[kept] = InvariantState(kept)
            self._shared.add(states[kept])
        return states[kept]

    def ring(self, key: PoolKey) -> int:
        """Pages that a request has in a tensor."""
        return self._pages[key].ring

    def take(self, name: str, make_room: Callable[[], None]) -> Seat:
        """A seat for a request. ``make_room`` frees those of requests that are over.

        Raises:
            PoolError: All are taken, and none was released for as long as a request waits.
        """
        end = time.monotonic() + self._wait
        with self._changed:
            if not self._free:
                make_room()
            while not self._free:
                left = end - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            if not self._free:
                waited = f", and none was released within {self._wait:g} seconds" if self._wait else ""
                raise PoolError(
                    f"all {self.seats} places for requests are taken{waited}",
                    where=f"cache context {name!r}",
                    hint="call cachepass.release(name) when a request is over, begin fewer at once, or give "
                    'options["pool_requests"] more',
                )
            return Seat(self, self._free.pop())

    def leave(self, number: int) -> None:
        """A seat is free."""
        with self._changed:
            self._free.append(number)
            self._changed.notify_all()


class Seat(Memory):
    """The place of one request in a pool; free again when nothing refers to it.

    Attributes:
        number: From 0.
    """

    pooled = True

    def __init__(self, pool: Pool, number: int) -> None:
        self.pool, self.number = pool, number
        weakref.finalize(self, pool.leave, number).atexit = False

    def make(
        self,
        key: PoolKey,
        slot: PlannedCut | NamedSlot,
        resolve: Callable[[object], int],
        number: int = 0,
    ) -> torch.Tensor:
        """The page itself, emptied: whoever had the seat before left something in it."""
        if key.kind == "invariant":  # which of these requests keep, no plan says
            self.pool.add({key: (slot, 1)}, resolve)
        with torch.inference_mode(False), torch.no_grad():
            return self.pool.tensor(key)[self.number * self.pool.ring(key) + number].zero_()

    def bytes_of(self, slots: Iterable[torch.Tensor]) -> int:
        return sum(slot.nbytes for slot in slots)


def bytes_of_request(
    slots: Mapping[PoolKey, tuple[PlannedCut | NamedSlot, int]], resolve: Callable[[object], int]
) -> int:
    """What one request keeps."""
    return sum(_pages_of(slot, ring, resolve).page_bytes for slot, ring in slots.values())


def _pages_of(slot: PlannedCut | NamedSlot, ring: int, resolve: Callable[[object], int]) -> _Pages:
    shape, stride = tuple(map(resolve, slot.shape)), tuple(map(resolve, slot.stride))
    return _Pages(ring, shape, stride, slot.slot_dtype, slot.device)
