"""Slots: what is kept of one value, and how it lies in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..recipe.value import Value


def bytes_of(shape: Sequence[int | torch.SymInt], dtype: torch.dtype) -> int:
    known = [size for size in shape if isinstance(size, int)]
    return math.prod(known) * dtype.itemsize if len(known) == len(shape) else 0


@dataclass(frozen=True)
class NamedSlot(Value):
    """What is kept of one value, for guidance or for a whole run: shape and dtype as of a :class:`Cut`'s slot."""

    name: str
    shape: tuple[int | torch.SymInt, ...]
    stride: tuple[int | torch.SymInt, ...]
    slot_dtype: torch.dtype
    device: torch.device

    @property
    def slot_bytes(self) -> int:
        return bytes_of(self.shape, self.slot_dtype)


def dense_strides(value: torch.Tensor) -> tuple[int | torch.SymInt, ...]:
    """The strides of a dense tensor, also in dimensions of size 1, where a value may carry any; symbolic ones as they
    are."""
    shape, strides = value.shape, value.stride()
    if any(isinstance(size, torch.SymInt) for size in (*shape, *strides)):
        return tuple(strides)
    dense, step = list(strides), 1
    for dim in sorted(range(value.ndim), key=lambda d: (strides[d] if shape[d] > 1 else 0, -d)):
        if shape[dim] > 1:
            dense[dim], step = step, step * shape[dim]
    for dim in reversed(range(value.ndim)):
        if shape[dim] == 1:
            dense[dim] = dense[dim + 1] * shape[dim + 1] if dim + 1 < value.ndim else 1
    return tuple(dense)
