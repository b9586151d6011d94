"""Identity: which memory a tensor lives in, without keeping that memory alive."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

_is_cached: Any = getattr(torch._C, "_is_cached_tensor", None)


def is_rewritten(tensor: torch.Tensor) -> bool:
    """A CUDA graph's output: the same object with new contents after every replay, which no version counter tells."""
    return _is_cached is not None and _is_cached(tensor)


class WeakStorage:
    """A storage, held weakly. While this object lives the storage's address is given to no other one."""

    __slots__ = ("_ref",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self._ref = StorageWeakRef(tensor.untyped_storage())

    def is_of(self, tensor: torch.Tensor) -> bool:
        try:
            return tensor.untyped_storage()._cdata == self._ref.cdata
        except (NotImplementedError, RuntimeError):
            return False

    @property
    def is_gone(self) -> bool:
        return self._ref.expired()


def weak_storage(tensor: torch.Tensor) -> WeakStorage | None:
    """The memory of a tensor; None where it has none of its own (sparse ones, wrappers of other tensors)."""
    try:
        return WeakStorage(tensor)
    except (NotImplementedError, RuntimeError):
        return None
