"""Liveness: the markers of an ATen graph, and which of them some phase needs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import fx

from .annotate import CUT, OUTPUT, PROBE


def cut_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The cut markers of an ATen graph, in order, without those of the model's output."""
    return [n for n in graph.find_nodes(op="call_function", target=CUT) if n.args[1] != OUTPUT]


def output_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The markers of the model's output."""
    return [n for n in graph.find_nodes(op="call_function", target=CUT) if n.args[1] == OUTPUT]


def probe_node(graph: fx.Graph) -> fx.Node | None:
    """The marker of the value that a decision looks at."""
    return next(iter(graph.find_nodes(op="call_function", target=PROBE)), None)


def base_of(marker: fx.Node) -> fx.Node | None:
    """What the value of a cut or probe is compared with, where its residual is meant."""
    index = {CUT: 3, PROBE: 2}.get(marker.target)  # pyright: ignore[reportArgumentType]
    base = marker.args[index] if index is not None and len(marker.args) > index else None
    return base if isinstance(base, fx.Node) else None


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


def reach_back(roots: Iterable[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    """Every node that the roots depend on, not looking behind those in ``stop`` but for what a residual is added to."""
    reached: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in reached:
            continue
        reached.add(node)
        if node not in stop:
            stack.extend(node.all_input_nodes)
        elif (base := base_of(node)) is not None:
            stack.append(base)
    return reached


def is_impure(node: fx.Node) -> bool:
    """Nodes that dead-code elimination must keep: the graph's ends and what writes to its inputs.

    fx's own notion also keeps seeded ops, among them every attention kernel, which have no effect but their value.
    """
    if node.op in ("placeholder", "output"):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
