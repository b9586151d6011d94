"""Numbers: a Python float that changes from call to call stays data on its way into tensors.

    keep_numbers : Dynamo GraphModule -> the same, with fewer tensors made of numbers

        item = timestep.item()                          item = timestep.item()
        t = torch.full((2,), item / 1000)         ->    t = torch.zeros((2,)) + item / 1000

Dynamo gives such a float to the graph as a tensor, and torch compiles tensor arithmetic with it for all values. A
tensor *made* of it is not arithmetic: torch would compile the model anew for every timestep.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .nodes import target_name


def keep_numbers(gm: fx.GraphModule) -> fx.GraphModule:
    """Write tensors that are made of a changing number as sums with it; ``gm`` itself is changed."""
    numbers = {node: number for node in gm.graph.nodes if (number := _number_in(node)) is not None}
    for node, number in numbers.items():
        value: torch.Tensor = node.meta["example_value"]
        # On an accelerator the number becomes an argument of the sum's kernel: nothing is copied or waited for.
        with gm.graph.inserting_before(node):
            zeros = gm.graph.call_function(torch.zeros, (_size(node),), {"dtype": value.dtype, "device": value.device})
            total = gm.graph.call_function(operator.add, (zeros, number))
            result = gm.graph.call_method("to", (total, value.dtype))
        for made in (zeros, total, result):
            made.meta = {k: v for k, v in node.meta.items() if k == "nn_module_stack"}
        result.meta["example_value"] = value
        node.replace_all_uses_with(result)
        gm.graph.erase_node(node)
    if numbers:
        gm.graph.lint()
        gm.recompile()
    return gm


def _number_in(node: fx.Node) -> fx.Node | None:
    """The number that fills the tensor that a node makes."""
    if not isinstance(node.meta.get("example_value"), torch.Tensor):
        return None
    name, data = target_name(node), None
    if name in ("full", "full_like", "new_full"):
        position = 2 if name == "new_full" else 1
        data = node.args[position] if len(node.args) > position else node.kwargs.get("fill_value")
    elif name in ("tensor", "as_tensor", "scalar_tensor") and node.args:
        data = node.args[0]
        while isinstance(data, (list, tuple)) and data and all(entry is data[0] for entry in data):
            data = data[0]
    is_number = isinstance(data, fx.Node) and isinstance(data.meta.get("example_value"), torch.SymFloat)
    return data if is_number else None  # pyright: ignore[reportReturnType]


def _size(node: fx.Node) -> Any:
    """The size of the tensor that a node makes, which may depend on other nodes."""
    if target_name(node) in ("full", "new_full"):
        return node.args[0 if target_name(node) == "full" else 1]
    return tuple(node.meta["example_value"].shape)
