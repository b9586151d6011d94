"""Nodes of graphs: what they call, take and return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx


def target_name(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def nodes_in(argument: Any) -> list[fx.Node]:
    """The nodes in an argument, however nested, in order, each as often as it stands there."""
    found: list[fx.Node] = []
    fx.map_arg(argument, found.append)
    return found


def operands(node: fx.Node) -> list[fx.Node]:
    """What a node reads, in order, each as often as it is read."""
    return nodes_in((node.args, node.kwargs))


def copied(graph: fx.Graph) -> fx.Graph:
    """A graph with the same nodes, and what is known of them."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {})).meta = dict(graph.output_node().meta)
    return copy


def arguments_of(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What an ATen operation is given, by the names of its parameters; what it is not given is not there."""
    names = [argument.name for argument in operation._schema.arguments]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def operand(node: fx.Node, index: int = 0) -> fx.Node:
    """An argument of a node that is a node itself."""
    value = node.args[index]
    assert isinstance(value, fx.Node), (node, index)
    return value


def returned_by(graph: fx.Graph) -> tuple[Any, ...]:
    """What a graph returns: nodes, and what is no value."""
    values: Any = graph.output_node().args[0]
    return tuple(values)
