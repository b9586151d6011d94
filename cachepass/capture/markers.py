"""Markers: where cuts, probes and the model's output stand in an ATen graph, and what leads to them."""

from __future__ import annotations

from collections.abc import Iterable

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
