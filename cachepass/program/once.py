"""Once: what is kept for a run, and how it is computed; nothing here compiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .sizes import SymbolBinder
from .slots import NamedSlot


@dataclass(frozen=True, eq=False)
class Once:
    """The program that computes what is kept for a run, and how the sizes of what it writes are found."""

    run: Callable[[list[Any]], Any]
    binder: SymbolBinder


@dataclass(frozen=True, eq=False)
class Invariants:
    """What is kept for a run.

    Attributes:
        slots: The values.
        checked: Indices of the inputs that they depend on, but those that the user declared.
        resized: Those of them whose sizes may differ from call to call.
        regions: Ids of the regions that are in what is computed once, and would have been cut.
    """

    slots: tuple[NamedSlot, ...]
    checked: tuple[int, ...]
    resized: frozenset[int]
    regions: tuple[str, ...]

    @property
    def slot_bytes(self) -> int:
        return sum(slot.slot_bytes for slot in self.slots)
