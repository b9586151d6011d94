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

import torch

from ..errors import PoolError
from ..program.plan import PlannedCut
from ..program.pools import PoolKey, pool_strides
from ..program.slots import NamedSlot
from .state import Memory


class Pool:
    """One tensor for each slot, with pages of all requests; made when it is first asked for.

    Attributes:
        seats: How many requests there is room for.
    """

    def __init__(
        self,
        slots: Mapping[PoolKey, tuple[PlannedCut | NamedSlot, int]],
        resolve: Callable[[object], int],
        seats: int,
        wait: float,
    ) -> None:
        self.seats = seats
        self._slots, self._resolve, self._wait = slots, resolve, wait
        self._tensors: dict[PoolKey, torch.Tensor] = {}
        self._free = list(reversed(range(seats)))
        self._changed = threading.Condition()

    @property
    def request_bytes(self) -> int:
        """Bytes that one request keeps."""
        numels = [(ring * math.prod(map(self._resolve, slot.shape)), slot) for slot, ring in self._slots.values()]
        return sum(numel * slot.slot_dtype.itemsize for numel, slot in numels)

    @property
    def planned_bytes(self) -> int:
        return self.seats * self.request_bytes

    @property
    def pool_bytes(self) -> int:
        """Bytes of the tensors that are made."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._tensors.values())

    @property
    def taken(self) -> int:
        """Requests that have a seat."""
        return self.seats - len(self._free)

    @property
    def device(self) -> torch.device:
        return next(slot.device for slot, _ in self._slots.values())

    def tensor(self, key: PoolKey) -> torch.Tensor:
        """The pages of all requests: ``[seats * ring, *slot]``."""
        tensor = self._tensors.get(key)
        if tensor is None:
            with self._changed:
                tensor = self._tensors.get(key)
                if tensor is None:
                    tensor = self._tensors[key] = self._make(key)
        return tensor

    def _make(self, key: PoolKey) -> torch.Tensor:
        slot, ring = self._slots[key]
        shape, stride = [self._resolve(n) for n in slot.shape], [self._resolve(n) for n in slot.stride]
        with torch.inference_mode(False), torch.no_grad():
            pages = torch.empty_strided(
                (self.seats * ring, *shape), pool_strides(shape, stride), dtype=slot.slot_dtype, device=slot.device
            )
            return pages.zero_()

    def ring(self, key: PoolKey) -> int:
        """Pages that a request has in a tensor."""
        return self._slots[key][1]

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
        slot: PlannedCut | NamedSlot,  # noqa: ARG002
        resolve: Callable[[object], int],  # noqa: ARG002
        number: int = 0,
    ) -> torch.Tensor:
        """The page itself, emptied: whoever had the seat before left something in it."""
        with torch.inference_mode(False), torch.no_grad():
            return self.pool.tensor(key)[self.number * self.pool.ring(key) + number].zero_()

    def bytes_of(self, slots: Iterable[torch.Tensor]) -> int:
        return sum(slot.nbytes for slot in slots)
