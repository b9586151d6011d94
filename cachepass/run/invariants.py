"""Invariants: the values that one graph keeps for a run, and the proof that they still hold.

A kept value holds while every input that it depends on is what it was: the same place in the same storage, with the
same version counter, which every write to a tensor raises. Storages are held weakly, so that none gets the address of
one that is gone (``_torch/memory.py``); no tensor is, because torch cannot swap tensors that are weakly referenced. In
the first step of a run all are computed anew, so writes through ``.data``, which leave no trace, are seen there; those
of PEFT's hot swap are heard of (``unseen.py``). Inputs that the user declared (``options["invariant_inputs"]``) are not
compared within a run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from .. import _torch
from ..program.rows.pools import PoolKey
from ..program.runnable import Invariants
from ..program.sizes import SymbolBinder
from .state import Memory
from .unseen import UNSEEN


class _Seen:
    """Inputs as they were when values were computed of them.

    ``resized`` are those whose sizes may differ from call to call: of all others Dynamo has checked them. A tensor
    that leaves no trace of being written to is never the same.
    """

    def __init__(self, checked: Sequence[int], inputs: Sequence[Any], resized: Collection[int]) -> None:
        self._numbers = {i: inputs[i] for i in checked if not isinstance(inputs[i], torch.Tensor)}
        self._numbers |= {i: inputs[i].item() for i in checked if i not in self._numbers and _is_number(inputs[i])}
        given = {i: inputs[i] for i in checked if i not in self._numbers}
        self._traceless = next((i for i, tensor in given.items() if not _torch.has_trace(tensor)), None)
        if self._traceless is not None:
            return
        self._tensors = tuple(given)
        tensors = list(given.values())
        self._held = [_torch.HeldStorage(tensor) for tensor in tensors]
        self._addresses = [held.address for held in self._held]
        self._versions = _torch.versions(tensors)
        self._offsets = _torch.offsets(tensors)
        self._forms = {i: _form(inputs[i]) for i in self._tensors if i in resized}

    def change(self, inputs: Sequence[Any]) -> int | None:
        """The first input that is not what it was. Asked at every step, of hundreds of parameters."""
        if self._traceless is not None:
            return self._traceless
        tensors = [inputs[i] for i in self._tensors]
        try:
            same = _torch.addresses(tensors) == self._addresses and _torch.versions(tensors) == self._versions
        except RuntimeError:  # one of them leaves no trace now
            same = False
        if not same or _torch.offsets(tensors) != self._offsets:
            return next(i for k, i in enumerate(self._tensors) if not self._is_same(k, inputs[i]))
        for i, form in self._forms.items():
            if _form(inputs[i]) != form:
                return i
        for i, number in self._numbers.items():
            value = inputs[i]
            if (value.item() if isinstance(value, torch.Tensor) else value) != number:
                return i
        return None

    def _is_same(self, k: int, tensor: torch.Tensor) -> bool:
        if not _torch.has_trace(tensor):
            return False
        found = _torch.addresses([tensor]), _torch.versions([tensor]), tensor.storage_offset()
        return found == ([self._addresses[k]], [self._versions[k]], self._offsets[k])


RESTLESS = 3  # computed anew so often in a row, within a run: worth a warning


def _is_number(tensor: torch.Tensor) -> bool:
    """A number of the caller's, which Dynamo makes a new tensor of at every call."""
    return tensor.ndim == 0 and tensor.device.type == "cpu"


def _form(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride()


class InvariantState:
    """What is kept of one graph in one run.

    Attributes:
        computed: How often the values were computed.
        epoch: The run that they were last computed for.
        changes: How often in a row, in the current run, that was because an input had changed.
        changed: Index of the input that had.
        varies: Its values were others, too; None: not looked at yet.
    """

    def __init__(self, kept: Invariants, memory: Memory | None = None) -> None:
        self.kept, self.memory = kept, memory or Memory()
        self.slots: dict[str, torch.Tensor] = {}
        self.computed = self.changes = 0
        self.stamp = 0  # of the last step that used it
        self.changed: int | None = None
        self.varies: bool | None = None
        self._sample: tuple[int, torch.Tensor] | None = None
        self._unseen = -1
        self._seen: _Seen | None = None
        self.epoch = -1
        self._sizes: tuple[int, ...] = ()

    @property
    def cache_bytes(self) -> int:
        return self.memory.bytes_of(self.slots.values())

    def refresh(self, inputs: Sequence[Any], epoch: int, binder: SymbolBinder, run: Callable[[list[Any]], Any]) -> None:
        """Compute the values, unless they hold for ``inputs``: the model's own, in front of what ``run`` writes.

        ``binder`` knows the slots' sizes.
        """
        sizes = binder.key(inputs)
        if sizes != self._sizes or not self.slots:
            resolve = binder.resolver(inputs)
            made = ((slot.name, PoolKey("invariant", slot.name), slot) for slot in self.kept.slots)
            self.slots = {name: self.memory.make(key, slot, resolve) for name, key, slot in made}
            self._sizes, self._seen = sizes, None
        self.changed = None
        unseen = UNSEEN.listen()
        if epoch == self.epoch and unseen == self._unseen and self._seen is not None:
            self.changed = self._seen.change(inputs)
            if self.changed is None:
                self.changes = 0
                return
        self.changes = 0 if self.changed is None else self.changes + 1
        if self.changed is not None and self.varies is None:
            self._compare(self.changed, inputs[self.changed])
        self._seen = None  # until they are all written
        run([*inputs, *(self.slots[slot.name] for slot in self.kept.slots)])
        self._seen = _Seen(self.kept.checked, inputs, self.kept.resized)
        self.epoch, self._unseen = epoch, unseen
        self.computed += 1

    def _compare(self, index: int, value: object) -> None:
        """Find out once whether an input that is another tensor at every step has other values, too: the warning to
        come says so."""
        known = self._sample
        if not isinstance(value, torch.Tensor):
            self.varies = True  # of numbers the values are compared
        elif self.changes == RESTLESS - 1:
            self._sample = index, value.clone()
        elif known is not None and self.changes == RESTLESS:
            same = known[0] == index and known[1].shape == value.shape and torch.equal(known[1], value)
            self.varies, self._sample = not same, None
