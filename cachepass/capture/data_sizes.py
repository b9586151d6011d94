"""Sizes that depend on data: which inputs of a Dynamo graph decide the size of a value.

    n = mask.sum().item()          n is a number that only running the graph tells
    text = text[:, :n]             so is the size of what is computed from this
    y = attn(cat(x, text))         what is kept of y is as long as the mask says

Such a value can be kept from step to step while the inputs that its size comes from stay the same: the host sees that
without reading them. Where latents or timestep are among them, it cannot.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence

import sympy
import torch
from torch import fx

from .. import _torch
from .markers import reach_back

_CUTS = {operator.getitem, torch.narrow, torch.split, "narrow", "split"}  # a part of a tensor, by numbers


def sizing_inputs(gm: fx.GraphModule, values: Sequence[fx.Node]) -> list[int] | None:
    """Indices of the inputs whose data the sizes of some values depend on; None: it is not known which."""
    definers = {symbol: node for node in gm.graph.nodes for symbol in _torch.defined_symbols(node)}
    wanted = [symbol for value in values for symbol in _symbols(value)]
    seen: set[sympy.Symbol] = set()
    read: list[fx.Node] = []
    while wanted:
        symbol = wanted.pop()
        if symbol in seen:
            continue
        seen.add(symbol)
        definer = definers.get(symbol)
        if definer is None:
            return None
        if _is_cut_by_numbers(definer):
            wanted += [other for source in definer.all_input_nodes for other in _symbols(source)]
        else:
            read.append(definer)
    reached = reach_back(read, set())
    return [i for i, node in enumerate(gm.graph.find_nodes(op="placeholder")) if node in reached]


def _symbols(node: fx.Node) -> Iterator[sympy.Symbol]:
    """The numbers in a node's value, or in its sizes, that only running the graph can tell."""
    value = node.meta.get("example_value")
    for part in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(part, (torch.Tensor, torch.SymInt)):
            yield from _torch.data_symbols(part)


def _is_cut_by_numbers(node: fx.Node) -> bool:
    """The sizes of its value follow from those of what it is a part of, and from numbers, not from data."""
    if node.target not in _CUTS:
        return False
    return not any(
        isinstance(source.meta.get("example_value"), torch.Tensor)
        for source in node.all_input_nodes
        if source is not node.args[0]
    )


def why_unfit(gm: fx.GraphModule, outputs: Sequence[fx.Node], varying: Collection[int | None]) -> str | None:
    """Why outputs whose sizes depend on data cannot be kept; None: they can. ``varying`` are the inputs (by index) that
    change from step to step."""
    inputs = sizing_inputs(gm, outputs)
    if inputs is None or any(i in varying for i in inputs):
        return "the size of an output depends on data that may change from step to step"
    values: list[torch.Tensor] = [output.meta["example_value"] for output in outputs]
    if not all(_torch.surely_contiguous(value) for value in values):
        return "the size of an output depends on data, and it is not contiguous"
    return None
