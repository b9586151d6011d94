"""ProbeTarget: how far is this step from the last one? One number, early in the program.

    look : graph with a probe marker -> Decision

        p = cachepass.probe(h, "blocks.0", x)           r = h - x
                                               ->       d = mean |r - kept| / mean |r|
                                                        ... at the end: copy_(kept, r); return d

The program returns the distance, and the host decides. Where the program itself decides (``lowering="cond"``) the host
gives it a bound, and learns of the verdict with the model's result::

    predict = forced > 0 or (forced == 0 and accumulated + polynomial(d) < value)
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import _torch
from ..capture.markers import base_of, probe_node, reach_back
from ..capture.nodes import operand
from ..recipe.frequency import wide_dtype
from ..recipe.vocabulary import ProbeTarget
from .emit import Emitter
from .plan import CachePlan
from .state_inputs import StateInputs
from .verdict import is_predicted, quotient, verdict

# Tags of nodes: it runs before the decision; its value is read behind it.
PREFIX, CARRIED = "cachepass_prefix", "cachepass_carried"


@dataclass(frozen=True)
class Decision:
    """What a program makes of its probe: the value to keep, and what the host is told: the distance, or the verdict."""

    value: fx.Node
    told: fx.Node


def look(graph: fx.Graph, plan: CachePlan, added: StateInputs, emit: Emitter) -> Decision | None:
    """Write the distance behind the marker, which is dropped; on a route that decides nothing, nothing else.

    In a program that decides, the predicate of the probe's group is made here.
    """
    marker = probe_node(graph)
    assert marker is not None and plan.probe is not None
    probe, reduced = plan.probe.probe, plan.process_group is not None
    base = base_of(marker)
    with graph.inserting_before(marker):
        value = emit.dense(operand(marker), marker)
    decision = None
    if added.probe is not None:
        with graph.inserting_before(marker.next):
            looked = emit.residual(value, base)
            if probe.transform is not None:
                looked = emit.traced(probe.transform, looked, added.parameters)
            looked = emit.restrided(looked, plan.probe.slot.stride)
            told = emit.traced(functools.partial(relative_l1, probe, reduced), looked, added.probe)
            if added.bound is not None:
                if reduced:
                    told = emit.traced(functools.partial(over_ranks, plan.process_group), told)
                told = emit.traced(verdict, told, added.bound)
                added.predicate[probe.group] = emit.traced(is_predicted, told)
        decision = Decision(looked, told)
    marker.replace_all_uses_with(value)
    graph.erase_node(marker)
    return decision


def relative_l1(probe: ProbeTarget, reduced: bool, value: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """``mean |value - kept| / mean |kept|`` in fp32 (fp64 for fp64): a scalar; of all samples, or the mean of each's.

    ``reduced``: the two means by themselves, ``[2]`` or ``[2, samples]``, for ranks that hold parts of the value.
    """
    wide = wide_dtype(value.dtype)
    value, kept = value.to(wide), kept.to(wide)
    if probe.metric == "magnitude":
        growth = torch.linalg.vector_norm(value, dim=-1) / (torch.linalg.vector_norm(kept, dim=-1) + 1e-8)
        change, size = growth.mean(), torch.ones_like(growth[..., :1]).mean()
        return torch.stack([change, size]) if reduced else change
    dims = list(range(1 if probe.per_sample else 0, value.ndim))
    change, size = (value - kept).abs().mean(dims), kept.abs().mean(dims)
    if reduced:
        return torch.stack([change, size])
    distance = change / size
    return distance.mean() if probe.per_sample else distance


def over_ranks(group: Any, means: torch.Tensor) -> torch.Tensor:
    return quotient(_torch.sum_over(means, group))


def tag_prefix(graph: fx.Graph, distance: fx.Node) -> None:
    """Mark the nodes of the prefix, and those of its values that others read."""
    reached = reach_back([distance], set())
    prefix = {node for node in reached if node.op not in ("placeholder", "output")}
    for node in graph.nodes:  # a list's elements come with the list, and a collective is waited for where it began
        is_part = node.target is operator.getitem or _torch.is_wait(node)
        if is_part and node.args[0] in prefix:
            prefix.add(node)
    for node in graph.nodes:
        if node not in prefix:
            continue
        node.meta[PREFIX] = True
        is_tensor = isinstance(node.meta.get("val"), torch.Tensor)
        if is_tensor and node is not distance and any(user not in prefix for user in node.users):
            node.meta[CARRIED] = node.name


def is_number(node: fx.Node) -> bool:
    """A size or another number that the graph computes on the host."""
    value = node.meta.get("val")
    return node.op == "call_function" and isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
