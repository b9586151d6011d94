"""Memory: which storage a tensor lies in, and whether it was written to."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

_version = operator.attrgetter("_version")
_address = operator.attrgetter("_cdata")


_is_cached: Any = getattr(torch._C, "_is_cached_tensor", None)


def is_rewritten(tensor: torch.Tensor) -> bool:
    """A CUDA graph's output: the same object with new contents after every replay, which no version counter tells."""
    return _is_cached is not None and _is_cached(tensor)


class HeldStorage:
    """A weak hold on a tensor's storage: the memory is freed as if there were none, and the address is given to no
    other storage. So an equal address is the same storage.

    It is no weak reference to the tensor: ``torch.utils.swap_tensors`` refuses tensors that have one.
    """

    __slots__ = ("_ref", "address")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._ref = StorageWeakRef(tensor.untyped_storage())
        self.address: int = self._ref.cdata

    def is_of(self, tensor: torch.Tensor) -> bool:
        """A tensor lies in this storage."""
        try:
            return _address(tensor.untyped_storage()) == self.address
        except (RuntimeError, NotImplementedError):
            return False

    def expired(self) -> bool:
        """The storage is gone."""
        return self._ref.expired()


def held_storage(tensor: torch.Tensor) -> HeldStorage | None:
    """A weak hold on a tensor's storage; None where it has none of its own (sparse ones, wrappers of other tensors)."""
    try:
        return HeldStorage(tensor)
    except (RuntimeError, NotImplementedError):
        return None


def addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    """The addresses of the tensors' storages.

    Raises:
        RuntimeError: One has no storage.
    """
    return list(map(_address, map(torch.Tensor.untyped_storage, tensors)))


def offsets(tensors: Sequence[torch.Tensor]) -> list[int | torch.SymInt]:
    """Where in their storages the tensors begin."""
    return list(map(torch.Tensor.storage_offset, tensors))


def versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    """The version counters of the tensors: a write raises them, but not one through ``.data`` or from outside of torch.

    Raises:
        RuntimeError: One is an inference tensor, which has none.
    """
    return list(map(_version, tensors))


def has_trace(tensor: torch.Tensor) -> bool:
    """Writes to a tensor can be told from its version and its storage. Not to one that a replayed CUDA graph returns:
    Inductor gives the same tensor each time, and the graph writes it without raising its version."""
    if tensor.is_inference() or any(t is not None and is_rewritten(t) for t in (tensor, tensor._base)):
        return False
    try:
        tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):  # sparse, or of another library's memory
        return False
    return True


__all__ = ["HeldStorage", "addresses", "has_trace", "held_storage", "is_rewritten", "offsets", "versions"]
