"""Nodes of Dynamo graphs: what they call."""

from __future__ import annotations

from torch import fx


def target_name(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))
