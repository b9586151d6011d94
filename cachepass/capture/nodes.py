"""Nodes of graphs: what they call, take and return."""

from __future__ import annotations

from typing import Any

from torch import fx


def target_name(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def operand(node: fx.Node, index: int = 0) -> fx.Node:
    """An argument of a node that is a node itself."""
    value = node.args[index]
    assert isinstance(value, fx.Node), (node, index)
    return value


def returned_by(graph: fx.Graph) -> tuple[Any, ...]:
    """What a graph returns: nodes, and what is no value."""
    values: Any = graph.output_node().args[0]
    return tuple(values)
