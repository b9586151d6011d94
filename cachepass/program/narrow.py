"""Narrow: a linear layer computes only the columns that a variant reads.

    narrow : graph of a variant -> the same graph, changed; returns the names of the layers that were cut

        e = addmm(bias, temb, w)  # [b, 6d]                 e = addmm(bias[2d:], temb, w[:, 2d:])  # [b, 4d]
        a0, .., a5 = split(e, d, 1)                    ->   a2 = e[:, :d]; ..
        a2, .., a5 are read; a0, a1 only fed a cut

Where an attention is predicted, the shift and scale of the norm before it are dead, and adaLN's linear computes them
beside what is alive. Slices of the weights are views: nothing is copied.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .. import _torch
from .emit import CONVERT, Emitter, alias_root, aten
from .liveness import is_impure

# Two launches for two runs of columns must be worth their while: reading this much takes a GPU about as long as one.
_GAP_BYTES = 1 << 20

_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


@dataclass(frozen=True)
class _Place:
    """Where a linear layer's columns stand in a value computed of its output: index ``i`` of dimension ``dim`` holds
    the columns from ``i * unit``. ``path``: the nodes from the layer's output to the value, each with its place."""

    node: fx.Node
    dim: int
    unit: int = 1
    path: tuple[_Place, ...] = ()


@dataclass(frozen=True)
class _Read:
    """A node that reads the columns from ``start`` to ``stop`` of the layer, out of the value at ``place``."""

    node: fx.Node
    place: _Place
    start: int
    stop: int

    @property
    def drops(self) -> bool:
        """The node takes one index, and its value has no such dimension."""
        return self.node.meta["val"].ndim < self.place.node.meta["val"].ndim


def narrow(graph: fx.Graph, gap_bytes: int = _GAP_BYTES) -> list[str]:
    """Cut every linear layer of which only some columns are read; unread runs of less than ``gap_bytes`` of its weights
    between two that are read stay in it."""
    emit = Emitter(graph, _torch.fake_mode_of([n.meta.get("val") for n in graph.nodes if n.op == "placeholder"]))
    output = graph.output_node()
    returned = {alias_root(node) for node in output.all_input_nodes}
    cut: list[str] = []
    changed: set[fx.Node] = set()
    for layer in list(graph.nodes):
        if layer.target not in (aten.mm.default, aten.addmm.default) or layer in returned:
            continue  # what the caller gets keeps its strides
        found = list(_reads(_Place(layer, 1)))
        reads = [read for read in found if read is not None]
        width = layer.meta["val"].shape[1]
        if not isinstance(width, int) or len(reads) < len(found):
            continue
        runs = _runs(reads, _column_bytes(layer), gap_bytes)
        if runs and sum(stop - start for start, stop in runs) < width:
            changed |= _rebuild(layer, reads, runs, emit)
            cut.append(layer.name)
    if cut:
        _update_values(graph, changed, emit)
        graph.eliminate_dead_code(is_impure_node=is_impure)
    return cut


# ---- what is read ---------------------------------------------------------------------------------------------------


def _reads(place: _Place) -> Iterator[_Read | None]:
    """Everything that reads a value, as runs of columns; None for what reads all of it, or in another order."""
    for user in place.node.users:
        selected = _selected(user, place.node, place.dim)
        if selected is not None:
            for node, start, stop in selected:
                yield from _nested(_Read(node, place, start * place.unit, stop * place.unit))
        else:
            moved = _moved(user, place)
            if moved is None:
                yield None
            else:
                yield from _reads(moved)


def _selected(user: fx.Node, value: fx.Node, dim: int) -> list[tuple[fx.Node, int, int]] | None:
    """The parts that a node takes of a value along ``dim``; None if it takes none, or takes them another way."""
    size, ndim = value.meta["val"].shape[dim], value.meta["val"].ndim
    args: Any = (*user.args, *[None] * 4)
    if user.target is aten.slice.Tensor:
        start, stop, step = args[2] or 0, size if args[3] is None else args[3], 1 if args[4] is None else args[4]
        if (args[1] or 0) % ndim != dim or step != 1 or not isinstance(start, int) or not isinstance(stop, int):
            return None
        bounds = [min(max(b + size if b < 0 else b, 0), size) for b in (start, stop)]
        return [(user, bounds[0], bounds[1])]
    if user.target is aten.select.int:
        if args[1] % ndim != dim or not isinstance(args[2], int):
            return None
        return [(user, args[2] % size, args[2] % size + 1)]
    if user.target not in (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int):
        return None
    position = 1 if user.target is aten.unbind.int else 2
    if (args[position] or 0) % ndim != dim or any(item.target is not operator.getitem for item in user.users):
        return None
    sizes = [1 if position == 1 else part.shape[dim] for part in user.meta["val"]]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    picked: list[tuple[fx.Node, Any]] = [(item, item.args[1]) for item in user.users if item.users]
    return [(item, starts[i], starts[i] + sizes[i]) for item, i in picked]


def _nested(read: _Read) -> Iterator[_Read]:
    """A part of which only parts are taken again is those parts."""
    dim, unit = read.place.dim, read.place.unit
    parts = [] if read.drops else [_selected(user, read.node, dim) for user in read.node.users]
    if not parts or any(part is None for part in parts):
        yield read
        return
    for node, start, stop in (entry for part in parts if part is not None for entry in part):
        yield from _nested(replace(read, node=node, start=read.start + start * unit, stop=read.start + stop * unit))


def _moved(user: fx.Node, place: _Place) -> _Place | None:
    """The place of the columns in a node that computes each of its elements of one of each operand's; else None."""
    ndim, value = place.node.meta["val"].ndim, user.meta.get("val")
    path = (*place.path, place)
    if not isinstance(user.target, torch._ops.OpOverload) or not isinstance(value, torch.Tensor):
        return None
    if user.target in _VIEWS:
        moved = _viewed(place.node.meta["val"].shape, place.dim, value.shape)
        return moved and _Place(user, moved[0], place.unit * moved[1], path)
    args: Any = user.args
    if user.target is aten.unsqueeze.default:
        at = args[1] % (ndim + 1)
        return _Place(user, place.dim + (at <= place.dim), place.unit, path)
    if user.target is aten.squeeze.dim:
        at = args[1] % ndim
        return None if at == place.dim else _Place(user, place.dim - (at < place.dim), place.unit, path)
    if user.target is CONVERT or torch.Tag.pointwise in user.target.tags:
        dim = place.dim + value.ndim - ndim
        named = any(isinstance(value, fx.Node) for value in user.kwargs.values())  # only positional operands are cut
        is_once = sum(arg is place.node for arg in user.args) == 1 and not named
        return _Place(user, dim, place.unit, path) if is_once else None
    return None


def _viewed(shape: Sequence[Any], dim: int, to: Sequence[Any]) -> tuple[int, int] | None:
    """The dimension of a view that divides ``dim`` into equal runs, and their length; None if there is none."""
    if not all(isinstance(size, int) for size in (*shape[dim:], *to[1:])):
        return None
    inner = math.prod(shape[dim + 1 :])
    for at in reversed(range(len(to))):
        run, rest = divmod(math.prod(to[at + 1 :]), inner)
        if to[at] != 1 and rest == 0 and to[at] * run == shape[dim]:
            return at, run
    return None


def _column_bytes(layer: fx.Node) -> int:
    weight = layer.args[-1]
    assert isinstance(weight, fx.Node)
    value: torch.Tensor = weight.meta["val"]
    return value.dtype.itemsize * (value.shape[0] if isinstance(value.shape[0], int) else 1)


def _runs(reads: Sequence[_Read], column_bytes: int, gap_bytes: int) -> list[tuple[int, int]]:
    """The columns that are read as runs, in order, in multiples of what the dimensions on the way hold together."""
    units = {place.unit for read in reads for place in (*read.place.path, read.place)}
    unit = math.lcm(*units)
    runs: list[tuple[int, int]] = []
    for start, stop in sorted((read.start // unit * unit, -(-read.stop // unit) * unit) for read in reads):
        gap = start - runs[-1][1] if runs else 0
        if runs and (gap <= 0 or gap * column_bytes < gap_bytes):
            runs[-1] = runs[-1][0], max(runs[-1][1], stop)
        else:
            runs.append((start, stop))
    return runs


# ---- what is computed instead ---------------------------------------------------------------------------------------


def _rebuild(layer: fx.Node, reads: Sequence[_Read], runs: Sequence[tuple[int, int]], emit: Emitter) -> set[fx.Node]:
    """Compute the runs, each by a layer of its own, and read from them. Returns the new values of the readers."""
    made: dict[tuple[fx.Node, tuple[int, int]], fx.Node] = {}

    def computed(place: _Place, run: tuple[int, int]) -> fx.Node:
        key = place.node, run
        if key not in made:
            with emit.before(place.node):
                if place.path:
                    made[key] = _narrowed(place, computed(place.path[-1], run), run, emit)
                else:
                    made[key] = _layer(layer, run, emit)
        return made[key]

    new = set()
    for read in reads:
        run = next(run for run in runs if run[0] <= read.start and read.stop <= run[1])
        value, unit = computed(read.place, run), read.place.unit
        start, stop = (read.start - run[0]) // unit, (read.stop - run[0]) // unit
        with emit.before(read.node):
            if read.drops:
                value = emit(aten.select.int, value, read.place.dim, start)
            elif stop - start < value.meta["val"].shape[read.place.dim]:
                value = emit(aten.slice.Tensor, value, read.place.dim, start, stop)
        read.node.replace_all_uses_with(value)
        new.add(value)
    return new


def _layer(layer: fx.Node, run: tuple[int, int], emit: Emitter) -> fx.Node:
    *bias, value, weight = layer.args
    weight = _sliced(weight, 1, run, emit)
    if not bias:
        return emit(aten.mm.default, value, weight)
    bias = _broadcast(bias[0], 2, 1, run, emit)
    return emit(aten.addmm.default, bias, value, weight, **layer.kwargs)


def _narrowed(place: _Place, source: fx.Node, run: tuple[int, int], emit: Emitter) -> fx.Node:
    """The node at a place, computed of its narrowed source."""
    node, before = place.node, place.path[-1].node
    part = run[0] // place.unit, run[1] // place.unit
    args: list[Any] = list(node.args)
    if node.target in _VIEWS:
        args[1] = [part[1] - part[0] if d == place.dim else size for d, size in enumerate(args[1])]
    elif torch.Tag.pointwise in node.target.tags:  # pyright: ignore
        args = [a if a is before else _broadcast(a, node.meta["val"].ndim, place.dim, part, emit) for a in args]
    args = [source if arg is before else arg for arg in args]
    assert callable(node.target)
    return emit(node.target, *args, **node.kwargs)


def _broadcast(value: Any, ndim: int, dim: int, part: tuple[int, int], emit: Emitter) -> Any:
    """An operand of a node with ``ndim`` dimensions, cut along the one that ``dim`` is there."""
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        return value
    own = dim - (ndim - value.meta["val"].ndim)
    return value if own < 0 or value.meta["val"].shape[own] == 1 else _sliced(value, own, part, emit)


def _sliced(value: Any, dim: int, part: tuple[int, int], emit: Emitter) -> fx.Node:
    """A slice of a value; of a transposed or converted one, that of what it is made of, so that no more is converted
    than is read."""
    assert isinstance(value, fx.Node)
    if value.target is aten.permute.default:
        order: Any = value.args[1]
        return emit(aten.permute.default, _sliced(value.args[0], order[dim] % len(order), part, emit), order)
    if value.target is CONVERT:
        return emit(CONVERT, _sliced(value.args[0], dim, part, emit), value.args[1])
    return emit(aten.slice.Tensor, value, dim, *part)


def _update_values(graph: fx.Graph, changed: set[fx.Node], emit: Emitter) -> None:
    """Readers may get other strides than before, and so may what is computed of them."""
    for node in graph.nodes:
        if node.op != "call_function" or node in changed or not any(n in changed for n in node.all_input_nodes):
            continue
        old = node.meta.get("val")
        fake = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        if isinstance(node.target, torch._ops.HigherOrderOperator) or not isinstance(old, (torch.Tensor, tuple, list)):
            continue
        with emit.fake_mode, torch.no_grad():
            value = node.target(*fake[0], **fake[1])
        if _strides(value) != _strides(old):
            node.meta["val"] = value
            changed.add(node)


def _strides(value: Any) -> list[Any]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v.stride() for v in values if isinstance(v, torch.Tensor)]
