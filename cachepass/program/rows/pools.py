"""Pools: what several requests keep, in one tensor for each slot.

pool of a cut    [seats * ring, *slot]    a request has a seat; its pages of the pool are ``ring`` in a row
other pools      [seats, *slot]           one page each
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..plan import CachePlan, PlannedCut
from ..slots import NamedSlot

NEXT = -1  # the age of the slot that a step writes


@dataclass(frozen=True)
class PoolKey:
    """Which memory of all requests a pool is: of a cut (``"cut"``, its index), or what has a name (``"output"``,
    ``"invariant"``), or the probe's (``"probe"``)."""

    kind: str
    name: int | str = ""


@dataclass(frozen=True)
class Page:
    """Which page of its pool a row reads or writes.

    Attributes:
        ring: Pages that a request has in the pool.
        group: Whose ring it is; of a pool that is no ring, nothing.
        age: Of the slot in its ring; ``NEXT``: the one that the step writes.
        output: The name of a slot of the model's output, which may be kept in the run of a step's other call.
    """

    ring: int = 1
    group: str = ""
    age: int = 0
    output: str = ""


def pooled(plan: CachePlan) -> dict[PoolKey, tuple[PlannedCut | NamedSlot, int]]:
    """What a request keeps by the plan: the slot, and how many of them."""
    found: dict[PoolKey, tuple[PlannedCut | NamedSlot, int]] = {
        PoolKey("cut", cut.index): (cut, cut.history) for cut in plan.live_cuts if cut.history
    }
    if plan.probe is not None:
        found[PoolKey("probe")] = plan.probe.slot, 1
    return found | {PoolKey("output", slot.name): (slot, 1) for slot in (plan.output.slots if plan.output else ())}


def pool_strides(shape: Sequence[Any], stride: Sequence[Any]) -> tuple[Any, ...]:
    """Of a pool whose pages have this shape and these dense strides."""
    return (math.prod(shape), *stride)
