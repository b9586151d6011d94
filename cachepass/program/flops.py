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


def count_flops(graph: fx.Graph) -> int | None:
    """FLOPs of one call. Sizes that are symbols count as the sizes that the graph was captured with. None: unknown,
    because sizes depend on data."""
    return add_known(*(flops_of(node) for node in graph.nodes if node.op == "call_function"))


def flops_of(node: fx.Node) -> int | None:
    """FLOPs of one operation; None: unknown."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), _value)
    return _torch.flops(node.target, args, kwargs, node.meta.get("val"))


def add_known(*counts: int | None) -> int | None:
    """The sum; None, if one of them is unknown."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _value(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return value if isinstance(value, (torch.Tensor, torch.SymInt)) else None
