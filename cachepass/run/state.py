"""State: the slots of one graph in one run, and which of them hold what.

A ring per cut; a step writes only the ring's next slot (or returns a new tensor in its place), and the ring turns after
the step succeeded. Until then the newest outputs are those of the last good step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..program.plan import CachePlan, OutputPlan, PlannedCut
from ..program.roles import History, Next, ProbeSlot
from ..program.rows.pools import PoolKey
from ..program.slots import NamedSlot
from ..recipe.schedule import Step
from ..recipe.vocabulary import GroupHistory
from .evidence import Seen


@dataclass
class GroupState(GroupHistory):
    """One schedule's history, and where its rings stand."""

    head: int = 0


class RunState:
    """What one graph keeps in one run: the slots of its cuts, and which of them hold what."""

    def __init__(self, plan: CachePlan, resolve: Callable[[object], int], memory: Memory | None = None) -> None:
        self.plan, self.resolve = plan, resolve
        self.memory = memory or Memory()
        self.groups = {group: GroupState() for group in plan.groups}
        self.stamp = 0  # of the last step that used it
        self.rings: dict[int, list[torch.Tensor | None]] = {}
        self.epoch = 0
        self._slot_lists: dict[tuple[object, ...], tuple[Sequence[History | Next], list[torch.Tensor]]] = {}
        self._received: dict[str, list[tuple[int, torch.Tensor]]] = {}
        self._stale = False
        self._probe: torch.Tensor | None = None
        self._looked: torch.Tensor | None = None  # what the probe's value of this step is, where the program returns it
        self._sizing: list[Seen] | None = None  # what the sizes of kept values come from
        self._grams: tuple[tuple[object, ...], list[torch.Tensor]] = (), []
        self.probed = False  # the probe's slot holds the value of a step of this run

    def follow(self, epoch: int, index: int) -> None:
        """Step ``index`` of the run ``epoch`` comes: what was kept in another run is over, and what a step kept that
        is repeated, because its call failed later on, is not history yet."""
        if self.epoch != epoch:
            self.forget_history()
            self.epoch = epoch
        for group, state in self.groups.items():
            if state.steps and state.steps[0] == index:
                del state.steps[0], state.timesteps[0]
                state.head = (state.head + 1) % self._ring(group)
                self._stale = True

    def follow_sizes(self, values: Sequence[Any]) -> bool:
        """The step that comes is given these inputs, which the sizes of kept values depend on. Whether something kept
        was dropped because one of them is another tensor: what is kept may have another size now."""
        seen = self._sizing
        if seen is not None and all(known.is_same(value) for known, value in zip(seen, values, strict=True)):
            return False
        self._sizing = [Seen(value) for value in values]
        dropped = any(state.steps for state in self.groups.values())
        self.forget_history()
        for cut in self.plan.live_cuts:
            if cut.sized_by_data:
                self.rings.pop(cut.index, None)
        self._slot_lists.clear()
        return dropped

    # ---- memory -----------------------------------------------------------------------------------------------------

    def _clear_slots(self) -> None:
        """A slot that holds nothing weighs 0, and 0 * inf is nan: what a diverged run or a step that failed left in it
        must not stay."""
        slots = []
        for index, ring in self.rings.items():
            state = self.groups[self.plan.cuts[index].group]
            old = [ring[(state.head + age) % len(ring)] for age in range(len(state.steps), len(ring))]
            slots += [slot for slot in old if slot is not None]
        if slots:
            with torch.inference_mode():  # what a program returned under it may be written to nowhere else
                torch._foreach_zero_(slots)
        self._stale = False

    @property
    def planned_bytes(self) -> int:
        """Bytes of the slots that the plan has; they are made when a program first asks for them. Where a size depends
        on data, nothing is known ahead."""
        live = [(cut, math.prod(map(self.resolve, cut.shape))) for cut in self.plan.live_cuts if not cut.sized_by_data]
        total = sum(cut.history * numel * cut.slot_dtype.itemsize for cut, numel in live)
        if self.plan.probe is not None:
            slot = self.plan.probe.slot
            total += math.prod(map(self.resolve, slot.shape)) * slot.slot_dtype.itemsize
        return total

    @property
    def cache_bytes(self) -> int:
        """Bytes of the slots that are allocated."""
        slots = [slot for ring in self.rings.values() for slot in ring if slot is not None]
        return self.memory.bytes_of(slots if self._probe is None else [*slots, self._probe])

    def slot_list(self, inputs: Sequence[History | Next]) -> list[torch.Tensor]:
        """The slots for a variant's history and next placeholders (``inputs``), as the rings stand now."""
        key = (id(inputs), *(state.head for state in self.groups.values()))
        known = self._slot_lists.get(key)
        if known is None:  # ``inputs`` is kept with the list, so that no other one can have its id
            known = inputs, [self._slot(role) for role in inputs]
            self._slot_lists[key] = known
        return known[1]

    def make_slots(self) -> None:
        """Make every slot: programs for several requests know them by number."""
        for cut in self.plan.live_cuts:
            self._ring_of(cut.index)
        if self.plan.probe is not None:
            self.probe_slot()

    def move(self, memory: Memory) -> None:
        """Keep the same in other memory."""
        for index, ring in self.rings.items():
            cut, key = self.plan.cuts[index], PoolKey("cut", index)
            for number, slot in enumerate(ring):
                if slot is not None:
                    ring[number] = memory.make(key, cut, self.resolve, number).copy_(slot)
        if self._probe is not None:
            assert self.plan.probe is not None
            self._probe = memory.make(PoolKey("probe"), self.plan.probe.slot, self.resolve).copy_(self._probe)
        self.memory = memory
        self._slot_lists.clear()
        if memory.pooled:
            self.make_slots()

    def page(self, group: str, ring: int, age: int) -> int:
        """Where in a ring of so many slots a group's output of this age lies, or the next one will."""
        return (self.groups[group].head + age) % ring

    def _slot(self, role: History | Next) -> torch.Tensor:
        ring, head = self._ring_of(role.cut), self.groups[role.group].head
        index = (head + (role.age if isinstance(role, History) else -1)) % len(ring)
        slot = ring[index]
        if slot is None:  # of a size that the last kept value tells
            newest = ring[head]
            assert newest is not None, "what is predicted was computed in this run"
            slot = ring[index] = torch.zeros_like(newest)
        return slot

    def _ring_of(self, index: int) -> list[torch.Tensor | None]:
        ring = self.rings.get(index)
        if ring is None:
            cut, key = self.plan.cuts[index], PoolKey("cut", index)
            make = self.memory.make
            slots = range(cut.history)
            ring = [None if cut.sized_by_data else make(key, cut, self.resolve, number) for number in slots]
            self.rings[index] = ring
        return ring

    def grams(self, group: str) -> list[torch.Tensor]:
        """Inner products of what is kept, newest first, for each cut of a group, in fp64 on the host: one transfer,
        and none while nothing new is kept."""
        state = self.groups[group]
        key = (group, *state.steps)
        if self._grams[0] != key:
            found = []
            for cut in self.plan.live_cuts:
                if cut.group == group and cut.history:
                    kept = [self._slot(History(group, cut.index, age)).flatten() for age in range(len(state.steps))]
                    # The smallest modes that count are 1e-4 of the largest: 1e-8 here, below what fp32 sums hold.
                    found.append(torch.stack([(a.double() * b.double()).sum() for a in kept for b in kept]))
            grams = torch.stack(found)
            if self.plan.process_group is not None:  # of values that ranks hold parts of
                torch.distributed.all_reduce(grams, group=self.plan.process_group)
            host = grams.cpu()
            self._grams = key, [gram.view(len(state.steps), -1) for gram in host]
        return self._grams[1]

    def newest(self, group: str) -> list[torch.Tensor]:
        """What was kept last for each cut of a group: the slots themselves."""
        return [self._slot(History(group, cut.index, 0)) for cut in self.plan.live_cuts if cut.group == group]

    def _ring(self, group: str) -> int:
        """Slots of a group's rings."""
        return max(self.plan.history(group), 1)

    # ---- history ----------------------------------------------------------------------------------------------------

    def forget_history(self) -> None:
        """Nothing kept counts any more; the memory stays."""
        for state in self.groups.values():
            state.clear()
        self._stale = True
        self.probed = False
        self._grams = (), []

    def forget_group(self, group: str) -> None:
        """Nothing kept of one group counts any more."""
        self.groups[group].clear()
        self._stale = True
        self._grams = (), []

    def begin(self, computed: Sequence[str], predicted: Sequence[str], *, writes: bool = True) -> None:
        """A step is about to run. If it ``writes`` slots, the oldest output of what it keeps is gone from now on."""
        if self._stale:
            self._clear_slots()
        self._stale = True  # until the step is committed
        self._received.clear()
        probe = None if self.plan.probe is None else self.plan.probe.probe
        if writes and probe is not None and (probe.every or probe.group in computed):
            self.probed = False
        written = [*computed, *[group for group in predicted if self.plan.recursive(group)]]
        for group in written if writes else ():
            history = self.plan.history(group)
            if history:
                del self.groups[group].steps[history - 1 :]
                del self.groups[group].timesteps[history - 1 :]

    def receive(self, roles: Sequence[Next | ProbeSlot], values: Sequence[torch.Tensor]) -> None:
        """What the program of the step returned: kept in place of the oldest outputs, once the step is committed."""
        for role, value in zip(roles, values, strict=True):
            if isinstance(role, ProbeSlot):
                self._looked = value
                continue
            own = value.clone() if role.shared else value
            if self.plan.cuts[role.cut].sized_by_data and own.untyped_storage().nbytes() != own.nbytes:
                own = own.clone(memory_format=torch.contiguous_format)  # a part of something larger
            self._received.setdefault(role.group, []).append((role.cut, own))

    def commit(
        self,
        step: Step,
        computed: Sequence[str],
        predicted: Mapping[str, tuple[float, ...]],
        distance: float | None = None,
    ) -> None:
        """The graph ran in a step: turn the rings of what was kept. ``predicted``: groups and their weights;
        ``distance``: what the probe measured, if it was asked."""
        self._stale = False
        probe = None if self.plan.probe is None else self.plan.probe.probe
        for group in computed:
            self._keep(group, step)
            self.groups[group].weights = ()
            self.groups[group].note(predicted=False, distance=distance)
        for group, weights in predicted.items():
            self.groups[group].weights = weights
            self.groups[group].note(predicted=True, distance=distance)
            if self.plan.recursive(group):
                self._keep(group, step)
        if probe is not None and (probe.every or probe.group in computed):
            self.probed = True
            if self._looked is not None:
                self.probe_slot().copy_(self._looked)
        self._looked = None
        self._received.clear()

    def probe_slot(self) -> torch.Tensor:
        """What the probe's value is compared with; anything, until one of a step of the run is kept (``probed``)."""
        if self._probe is None:
            assert self.plan.probe is not None
            self._probe = self.memory.make(PoolKey("probe"), self.plan.probe.slot, self.resolve)
        return self._probe

    def _keep(self, group: str, step: Step) -> None:
        state = self.groups[group]
        state.keep(step, max(self.plan.history(group), 1))
        state.head = (state.head - 1) % self._ring(group)
        for cut, value in self._received.pop(group, ()):
            self._ring_of(cut)[state.head] = value
            self._slot_lists.clear()


class OutputState:
    """What a run keeps of the model's output, for guidance: one slot for each name, and when they were written."""

    def __init__(self, plan: OutputPlan, memory: Memory | None = None) -> None:
        self.plan, self.memory = plan, memory or Memory()
        self.stamp = 0  # of the last step that used it
        self.group = GroupState()
        self.slots: dict[str, torch.Tensor] = {}
        self.epoch = 0

    def follow(self, epoch: int) -> None:
        """What was kept in another run is over."""
        if self.epoch != epoch:
            self.group.steps.clear()
            self.group.weights = ()
            self.epoch = epoch

    @property
    def cache_bytes(self) -> int:
        return self.memory.bytes_of(self.slots.values())

    def move(self, memory: Memory) -> None:
        """Keep the same in other memory."""
        before, self.slots, self.memory = self.slots, {}, memory
        for name, slot in before.items():
            self.slot(name).copy_(slot)

    def slot(self, name: str) -> torch.Tensor:
        if name not in self.slots:
            slot = next(slot for slot in self.plan.slots if slot.name == name)
            self.slots[name] = self.memory.make(PoolKey("output", name), slot, int)  # pyright: ignore
        return self.slots[name]

    def begin(self) -> None:
        """The slots are about to be written; they have no spare one."""
        self.group.steps.clear()

    def commit(self, index: int, weights: tuple[float, ...] | None) -> None:
        """Kept in step ``index`` or, with ``weights``, used in it."""
        if weights is None:
            self.group.steps, self.group.weights = [index], ()
        else:
            self.group.weights = weights


class Memory:
    """Where slots lie: each in memory of its own."""

    pooled = False

    def make(
        self,
        key: PoolKey,  # noqa: ARG002
        slot: PlannedCut | NamedSlot,
        resolve: Callable[[object], int],
        number: int = 0,  # noqa: ARG002
    ) -> torch.Tensor:
        """The slot of this number in its ring, with zeros."""
        return allocate(slot, resolve)

    def bytes_of(self, slots: Iterable[torch.Tensor]) -> int:
        return sum(slot.untyped_storage().nbytes() for slot in slots)


def allocate(slot: PlannedCut | NamedSlot, resolve: Callable[[object], int]) -> torch.Tensor:
    shape, stride = [resolve(s) for s in slot.shape], [resolve(s) for s in slot.stride]
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty_strided(shape, stride, dtype=slot.slot_dtype, device=slot.device).zero_()
