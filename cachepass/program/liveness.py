"""Liveness: which cuts of an ATen graph some phase needs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import fx

from ..capture.annotate import PROBE
from ..capture.markers import reach_back


def subsets(groups: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return tuple(p for n in range(len(groups) + 1) for p in itertools.combinations(groups, n))


def live_markers(graph: fx.Graph, group_of: dict[fx.Node, str], groups: Sequence[str]) -> set[fx.Node]:
    """Cuts whose forecast is read in some phase.

    A cut that is computed in a phase is itself a root of that phase once its slots are known to be read elsewhere:
    its value must be there to be kept. So this is a fixpoint; it grows at most once per cut.
    """
    live: set[fx.Node] = set()
    while True:
        before = len(live)
        for phase in subsets(groups):
            roots = [n for n in graph.nodes if n.op == "output" or is_impure(n) or n.target is PROBE]
            roots += [n for n in live if group_of[n] not in phase]
            reached = reach_back(roots, {n for n, group in group_of.items() if group in phase})
            live |= {n for n, group in group_of.items() if group in phase and n in reached}
        if len(live) == before:
            return live


def is_impure(node: fx.Node) -> bool:
    """Nodes that dead-code elimination must keep: the graph's ends and what writes to its inputs.

    fx's own notion also keeps seeded ops, among them every attention kernel, which have no effect but their value.
    """
    if node.op in ("placeholder", "output"):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
