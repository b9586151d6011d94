"""Room: how much a model may keep, over all of its runs.

Everything that is kept from step to step counts: the slots of cuts, of guidance, and of what stays the same within a
run. Where a new state needs more than is left, the least recently used ones go. A run that loses its history in the
middle computes again, as in its first steps.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .runs import Run

_SHARE = 4  # by default a model's states take at most a quarter of a device's memory: they live beside the model


class Room:
    """The bound of one model.

    Attributes:
        limit: In bytes; None until the device is known, where the user did not say.
        pools: Bytes of pools, which nobody can make room in.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.pools = 0

    def make(self, needed: int, device: torch.device, runs: Iterable[Run], own: Run) -> None:
        """Drop states until ``needed`` bytes more would fit; those of the current run of ``own``, whose step this is,
        stay."""
        runs = list(runs)
        held = sum(state.cache_bytes for run in runs for _, _, state, _ in _kept(run))
        over = held + self.pools + needed - self.limit_on(device)
        if over <= 0:
            return
        kept = [one for run in runs if run is own or not run.in_step for one in _kept(run)]
        kept.sort(key=lambda one: (one[2].epoch == one[0].epoch, one[2].stamp))
        for run, holder, state, key in kept:
            if over <= 0:
                return
            current = state.epoch == run.epoch
            if run is own and current:
                continue
            over -= state.cache_bytes
            del holder[key]
            run.dropped = run.dropped or current  # it is known when the run goes on whether it was over

    def limit_on(self, device: torch.device) -> int:
        """The bound, for what is kept on a device."""
        if self.limit is None:
            self.limit = memory_of(device) // _SHARE
        return self.limit


def _kept(run: Run) -> Iterator[tuple[Run, Any, Any, Any]]:
    """Every state of a run that can make room, and where it is kept."""
    for holder in (run.states, run.outputs, run.invariants):
        for key, state in list(holder.items()):
            if state.cache_bytes and not state.memory.pooled:
                yield run, holder, state, key


def memory_of(device: torch.device) -> int:
    """Bytes of a device's memory. Where the system does not tell (Windows), 16 GiB of the host's."""
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**34
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(properties.total_memory)
