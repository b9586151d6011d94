"""FLOPs: what a graph's matrix products, convolutions and attentions cost.

    count_flops : ATen graph -> floating-point operations, a multiply-add counted as two

Everything else (norms, activations, elementwise arithmetic) is bound by memory and not counted, as in
``torch.utils.flop_counter``, whose formulas these are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .. import _torch


def count_flops(graph: fx.Graph) -> int:
    """FLOPs of one call. Sizes that are symbols count as the sizes that the graph was captured with."""
    return sum(flops_of(node) for node in graph.nodes if node.op == "call_function")


def flops_of(node: fx.Node) -> int:
    """FLOPs of one operation."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), _value)
    return _torch.flops(node.target, args, kwargs, node.meta.get("val"))


def _value(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return value if isinstance(value, (torch.Tensor, torch.SymInt)) else None
