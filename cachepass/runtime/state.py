"""State: the slots of one model instance in one context, and which of them hold what.

A ring per cut; a step writes only the ring's next slot, and the ring turns after the step succeeded. Until then the
newest outputs are those of the last good step.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import sympy
import torch

from ..errors import ConcurrencyError
from ..graph.plan import CachePlan, Cut
from ..graph.rewrite import Role
from ..methods import GroupHistory
from .clock import Clock


@dataclass
class GroupState(GroupHistory):
    """One schedule's history: where its rings stand, and how often it was predicted in this run."""

    head: int = 0
    predicted: int = 0


class RunState:
    """Slots, histories and clock of one (instance, context)."""

    def __init__(self, context: str, plan: CachePlan, num_inference_steps: int | None) -> None:
        self.context, self.plan = context, plan
        self.clock = Clock(num_inference_steps)
        self.groups = {group: GroupState() for group in plan.groups}
        self.rings: dict[int, list[torch.Tensor]] = {}
        self.sizes: tuple[int, ...] | None = None
        self._slot_lists: dict[tuple[object, ...], list[torch.Tensor]] = {}
        self._stale = False
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def exclusively(self) -> Iterator[None]:
        """One call at a time; a second one in another thread raises instead of mixing two histories."""
        if not self._lock.acquire(blocking=False):
            raise ConcurrencyError(
                "this context is in use by another call of the same model",
                where=f"cache context {self.context!r}",
                hint='give each thread its own: with cachepass.cache_context("name"): ...',
            )
        try:
            yield
        finally:
            self._lock.release()

    # ---- memory -----------------------------------------------------------------------------------------------------

    def allocate(self, sizes: tuple[int, ...], resolve: Callable[[object], int]) -> bool:
        """Make the slots, once per set of symbolic sizes; other sizes start a fresh history.

        Returns whether a history was given up for it.
        """
        if self.sizes == sizes:
            if self._stale:
                self._clear_slots()
            return False
        changed = self.sizes is not None
        if changed:
            self.forget_history()
        with torch.inference_mode(False), torch.no_grad():
            self.rings = {cut.index: [_slot(cut, resolve) for _ in range(self.plan.slots(cut))]
                          for cut in self.plan.live_cuts if cut.history}  # fmt: skip
        self.sizes, self._stale = sizes, False
        self._slot_lists.clear()
        return changed

    def _clear_slots(self) -> None:
        """A slot that holds nothing weighs 0, and 0 * inf is nan: what a diverged run left must not stay."""
        slots = [slot for ring in self.rings.values() for slot in ring]
        if slots:
            torch._foreach_zero_(slots)
        self._stale = False

    @property
    def cache_bytes(self) -> int:
        """Bytes of the slots that are allocated."""
        return sum(slot.untyped_storage().nbytes() for ring in self.rings.values() for slot in ring)

    def slot_list(self, inputs: Sequence[Role]) -> list[torch.Tensor]:
        """The slots for a variant's history and next placeholders, in order, as the rings stand now."""
        key = (id(inputs), *(state.head for state in self.groups.values()))
        slots = self._slot_lists.get(key)
        if slots is None:
            slots = [self._slot(role) for role in inputs if role.kind in ("history", "next")]
            self._slot_lists[key] = slots
        return slots

    def _slot(self, role: Role) -> torch.Tensor:
        ring, head = self.rings[role.cut], self.groups[role.group].head
        return ring[(head + (role.age if role.kind == "history" else -1)) % len(ring)]

    # ---- history ----------------------------------------------------------------------------------------------------

    def forget_history(self) -> None:
        """Nothing kept counts any more; the memory stays."""
        for state in self.groups.values():
            state.steps.clear()
            state.predicted = 0
        self.clock.restart()
        self._stale = True

    def begin(self, computed: Sequence[str]) -> None:
        """A step is about to write the next slot of these groups: without a spare one, the oldest output is gone."""
        for group in computed:
            history = self.plan.history(group)
            if not self.plan.spare and history:
                del self.groups[group].steps[history - 1 :]

    def commit(self, computed: Sequence[str], predicted: Sequence[str], timestep: float | None) -> None:
        """The step succeeded: turn the rings of what was computed and advance the clock."""
        for group in computed:
            state, history = self.groups[group], self.plan.history(group)
            state.steps.insert(0, self.clock.index)
            del state.steps[max(history, 1) :]
            state.head = (state.head - 1) % max(history + self.plan.spare, 1)
        for group in predicted:
            self.groups[group].predicted += 1
        self.clock.commit(timestep)


def _slot(cut: Cut, resolve: Callable[[object], int]) -> torch.Tensor:
    shape, stride = [resolve(s) for s in cut.shape], [resolve(s) for s in cut.stride]
    return torch.empty_strided(shape, stride, dtype=cut.slot_dtype, device=cut.device).zero_()


@dataclass(frozen=True)
class SymbolBinder:
    """Finds the values of the symbols in given sizes from the inputs of a call.

    ``symbols`` maps a symbol to where it stands: an input index, and a dimension of it (None: the input itself).
    """

    symbols: dict[sympy.Symbol, tuple[int, int | None]] = field(default_factory=dict)

    @staticmethod
    def of(values: Sequence[object], sizes: Sequence[object]) -> SymbolBinder:
        needed = {symbol for s in sizes if isinstance(s, torch.SymInt) for symbol in s.node.expr.free_symbols}
        symbols: dict[sympy.Symbol, tuple[int, int | None]] = {}

        def add(size: object, index: int, dim: int | None) -> None:
            if isinstance(size, torch.SymInt) and size.node.expr in needed:
                symbols.setdefault(size.node.expr, (index, dim))

        for index, value in enumerate(values):
            add(value, index, None)
            if isinstance(value, torch.Tensor):
                for dim, size in enumerate(value.shape):
                    add(size, index, dim)
        return SymbolBinder(symbols)

    def bind(self, inputs: Sequence[object]) -> dict[sympy.Symbol, int]:
        """The symbols' values for the inputs of a call."""
        if not self.symbols:
            return {}
        return {s: int(inputs[i] if d is None else inputs[i].shape[d])  # pyright: ignore
                for s, (i, d) in self.symbols.items()}  # fmt: skip


def resolve_size(size: object, bound: dict[sympy.Symbol, int]) -> int:
    if isinstance(size, torch.SymInt):
        return int(size.node.expr.xreplace(bound))
    assert isinstance(size, int)
    return size
