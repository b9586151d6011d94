"""Invariants: the values that one graph keeps for a run, and the proof that they still hold.

A kept value holds while every input that it depends on is the tensor that it was: the same object (or a view of the
same memory in the same form) with the same version counter, which every write to a tensor raises. In the first step of
a run all are computed anew, so writes through ``.data``, which leave no trace, are seen there. Inputs that the user
declared (``options["invariant_inputs"]``) are not compared within a run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..graph.hoist import Hoisted
from .state import allocate


class _Seen:
    """A tensor as it was when values were computed of it."""

    __slots__ = ("base", "form", "index", "tensor", "value", "version")

    def __init__(self, index: int, value: Any) -> None:
        self.index = index
        self.tensor: Callable[[], Any] = _nothing
        self.value = self.version = self.base = self.form = None
        if not isinstance(value, torch.Tensor):
            self.value = value
        elif value.ndim == 0 and value.device.type == "cpu":
            self.value = value.item()  # a number of the caller's
        elif not value.is_inference():  # an inference tensor leaves no trace of being written to: never the same
            self.tensor, self.version = weakref.ref(value), value._version
            # Views made anew at every call (the conditional half of a batch) are known by what they are views of.
            if value._base is not None:
                self.base, self.form = weakref.ref(value._base), _form(value)

    def is_same(self, value: Any) -> bool:
        if self.value is not None:
            return self.value == (value.item() if isinstance(value, torch.Tensor) else value)
        if self.version is None or value.is_inference() or value._version != self.version:
            return False
        if self.tensor() is value:
            return True
        return self.base is not None and self.base() is value._base and self.form == _form(value)


def _nothing() -> None:
    return None


def _form(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


class InvariantState:
    """What is kept of one graph in one run.

    Attributes:
        computed: How often the values were computed.
        epoch: The run that they were last computed for.
        changes: How often in a row, in the current run, that was because an input had changed.
        changed: Index of the input that had.
    """

    def __init__(self, hoisted: Hoisted, declared: frozenset[int]) -> None:
        self.hoisted = hoisted
        self._checked = tuple(index for index in hoisted.reads if index not in declared)
        self.slots: dict[str, torch.Tensor] = {}
        self.computed = self.changes = 0
        self.stamp = 0  # of the last step that used it
        self.changed: int | None = None
        self._seen: list[_Seen] | None = None
        self.epoch = -1
        self._sizes: tuple[int, ...] = ()

    @property
    def cache_bytes(self) -> int:
        return sum(slot.untyped_storage().nbytes() for slot in self.slots.values())

    def refresh(self, inputs: Sequence[Any], epoch: int, sizes: tuple[int, ...], resolve: Callable[[object], int],
                run: Callable[[list[Any]], Any]) -> None:  # fmt: skip
        """Compute the values, unless they hold for ``inputs``: the model's own, in front of what ``run`` writes.

        ``sizes`` are the values of the symbols in the slots' sizes, which ``resolve`` puts in.
        """
        if sizes != self._sizes or not self.slots:
            self.slots = {slot.name: allocate(slot, resolve) for slot in self.hoisted.slots}
            self._sizes, self._seen = sizes, None
        self.changed = None
        if epoch == self.epoch and self._seen is not None:
            self.changed = self._find_change(inputs)
            if self.changed is None:
                self.changes = 0
                return
        self.changes = 0 if self.changed is None else self.changes + 1
        self._seen = None  # until they are all written
        run([*inputs, *(self.slots[slot.name] for slot in self.hoisted.slots)])
        self._seen = [_Seen(index, inputs[index]) for index in self._checked]
        self.epoch = epoch
        self.computed += 1

    def _find_change(self, inputs: Sequence[Any]) -> int | None:
        """The first input that is not what it was. Asked at every step, of hundreds of parameters."""
        assert self._seen is not None
        for seen in self._seen:
            value = inputs[seen.index]
            if (seen.tensor() is not value or value._version != seen.version) and not seen.is_same(value):
                return seen.index
        return None
