"""Rejoin: what was only cut apart to be put together again is taken as it was.

    a = slice(x, 1, 0, 512)
    b = slice(x, 1, 512, 4608)          ->          c = x
    c = cat([a, b], 1)

FLUX's single blocks return the text's and the image's tokens as two tensors, which the next block joins: a copy of all
tokens between any two blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ..capture.nodes import operand, returned_by
from .emit import TO_THE_END, alias_root, aten
from .liveness import is_impure


def rejoin(graph: fx.Graph) -> None:
    """Replace concatenations of all parts of a value by the value. What leaves the graph, or lies in an input's memory,
    stays a copy."""
    returned = {alias_root(value) for value in returned_by(graph) if isinstance(value, fx.Node)}
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
        if not isinstance(parts, Sequence) or not isinstance(dim, int):
            continue
        source = _whole(parts, dim, node)
        if source is not None and node not in returned and alias_root(source).op != "placeholder":
            node.replace_all_uses_with(source)
    graph.eliminate_dead_code(is_impure_node=is_impure)


def _whole(parts: Sequence[object], dim: int, joined: fx.Node) -> fx.Node | None:
    """What the parts are all of, one behind the other."""
    value: torch.Tensor = joined.meta["val"]
    dim, end, source = dim % value.ndim, 0, None
    for part in parts:
        if not isinstance(part, fx.Node) or part.target is not aten.slice.Tensor:
            return None
        of, along, start, stop, step = _slice(part)
        size = of.meta["val"].shape[dim]
        if source not in (None, of) or along != dim or step != 1 or start != end or not isinstance(size, int):
            return None
        source, end = of, min(stop, size)
    if source is None:
        return None
    whole: torch.Tensor = source.meta["val"]
    alike = whole.shape == value.shape and whole.dtype == value.dtype and whole.stride() == value.stride()
    return source if alike and end == whole.shape[dim] else None


def _slice(node: fx.Node) -> tuple[fx.Node, int, object, int, object]:
    """Of what, along which dimension, from where, to where, in which steps."""
    defaults = (None, 0, 0, TO_THE_END, 1)
    args = [node.args[i] if i < len(node.args) else default for i, default in enumerate(defaults)]
    source, dim, start, stop, step = args
    dim = int(dim) % operand(node).meta["val"].ndim if isinstance(dim, int) else -1
    size = operand(node).meta["val"].shape[dim]
    start = 0 if start is None else start + size if isinstance(start, int) and start < 0 else start
    stop = TO_THE_END if stop is None else stop + size if isinstance(stop, int) and stop < 0 else stop
    assert isinstance(source, fx.Node)
    return source, dim, start, stop if isinstance(stop, int) else -1, step
