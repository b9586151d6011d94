"""State: the slots of one model instance in one context, and which of them hold what.

A ring per cut; a step writes only the ring's next slot, and the ring turns after the step succeeded. Until then the
newest outputs are those of the last good step.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import sympy
import torch

from ..errors import ConcurrencyError
from ..graph.plan import CachePlan, Cut, OutputSlot
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
        self.groups = {group: GroupState() for group in plan.schedules}
        self.rings: dict[int, list[torch.Tensor]] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        self.sizes: tuple[int, ...] | None = None
        self._slot_lists: dict[tuple[object, ...], list[torch.Tensor]] = {}
        self._stale = False
        self._resolve: Callable[[object], int] = int  # pyright: ignore[reportAttributeAccessIssue]
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

    def prepare(self, sizes: tuple[int, ...], resolve: Callable[[object], int]) -> bool:
        """Get ready for a call with these values of the symbolic sizes; other sizes start a fresh history.

        Returns whether a history was given up for it. Slots are made when a program first asks for them.
        """
        if self.sizes == sizes:
            if self._stale:
                self._clear_slots()
            return False
        changed = self.sizes is not None
        if changed:
            self.forget_history()
        self.rings.clear()
        self.outputs.clear()
        self._slot_lists.clear()
        self.sizes, self._stale, self._resolve = sizes, False, resolve
        return changed

    def _clear_slots(self) -> None:
        """A slot that holds nothing weighs 0, and 0 * inf is nan: what a diverged run or a step that failed left in it
        must not stay."""
        slots = []
        for index, ring in self.rings.items():
            state = self.groups[self.plan.cuts[index].group]
            slots += [ring[(state.head + age) % len(ring)] for age in range(len(state.steps), len(ring))]
        if slots:
            torch._foreach_zero_(slots)
        self._stale = False

    @property
    def cache_bytes(self) -> int:
        """Bytes of the slots that are allocated."""
        slots = [*self.outputs.values(), *(slot for ring in self.rings.values() for slot in ring)]
        return sum(slot.untyped_storage().nbytes() for slot in slots)

    def slot_list(self, inputs: Sequence[Role], partner: RunState | None = None) -> list[torch.Tensor]:
        """The slots for a variant's history, next and output placeholders, in order, as the rings stand now."""
        key = (id(inputs), *(state.head for state in self.groups.values()))
        slots = self._slot_lists.get(key)
        if slots is None:
            slots = [self._slot(role, partner) for role in inputs if role.kind in ("history", "next", "output")]
            self._slot_lists[key] = slots
        return slots

    def _slot(self, role: Role, partner: RunState | None) -> torch.Tensor:
        if role.kind == "output":
            holds = partner is not None and role.slot in partner.outputs
            return partner.outputs[role.slot] if holds else self._output(role.slot)  # pyright: ignore
        ring = self.rings.get(role.cut)
        if ring is None:
            cut = self.plan.cuts[role.cut]
            ring = self.rings[role.cut] = [_slot(cut, self._resolve) for _ in range(self.plan.slots(cut))]
        return ring[(self.groups[role.group].head + (role.age if role.kind == "history" else -1)) % len(ring)]

    def _output(self, name: str) -> torch.Tensor:
        if name not in self.outputs:
            assert self.plan.output is not None
            slot = next(slot for slot in self.plan.output.slots if slot.name == name)
            self.outputs[name] = _slot(slot, self._resolve)
        return self.outputs[name]

    # ---- history ----------------------------------------------------------------------------------------------------

    def forget_history(self) -> None:
        """Nothing kept counts any more; the memory stays."""
        for state in self.groups.values():
            state.steps.clear()
            state.weights = ()
            state.predicted = 0
        self.clock.restart()
        self._stale = True

    def begin(self, computed: Sequence[str], predicted: Sequence[str]) -> None:
        """A step is about to write the next slot of what it keeps: without a spare one, the oldest output is gone."""
        self._stale = True  # until the step is committed
        for group in (*computed, *(group for group in predicted if self.plan.recursive(group))):
            history = self.plan.history(group)
            if history and not self.plan.spare:
                del self.groups[group].steps[history - 1 :]
            elif group not in self.plan.groups:  # what is kept of the output has no spare slot
                self.groups[group].steps.clear()

    def commit(self, call_weights: Mapping[str, tuple[float, ...]], computed: Sequence[str], predicted: Sequence[str],
               timestep: float | None) -> None:  # fmt: skip
        """The step succeeded: turn the rings of what was kept and advance the clock."""
        self._stale = False
        for group in computed:
            self._keep(group)
            self.groups[group].weights = ()
        for group in predicted:
            self.groups[group].predicted += 1
            self.groups[group].weights = call_weights.get(group, ())
            if self.plan.recursive(group):
                self._keep(group)
        self.clock.commit(timestep)

    def _keep(self, group: str) -> None:
        state, history = self.groups[group], self.plan.history(group)
        state.steps.insert(0, self.clock.index)
        del state.steps[max(history, 1) :]
        state.head = (state.head - 1) % max(history + self.plan.spare, 1)


def _slot(slot: Cut | OutputSlot, resolve: Callable[[object], int]) -> torch.Tensor:
    shape, stride = [resolve(s) for s in slot.shape], [resolve(s) for s in slot.stride]
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty_strided(shape, stride, dtype=slot.slot_dtype, device=slot.device).zero_()


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
