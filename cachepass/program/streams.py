"""Streams: the residual streams that run through a region, found by dataflow in the ATen graph.

    resolve : ATen GraphModule with cut, enter and probe markers -> the same, each residual marker with its base

        x = enter(hidden, r)                                x = hidden
        y = x + attention(norm(x))                  ->      y = x + attention(norm(x))
        z = y + mlp(norm(y))                                z = y + mlp(norm(y))
        out = cut(z, r, 0)                                  out = cut(z, r, 0, x)

A block adds to what it is given. What would leave the region if nothing were added - the *skeleton* of a value - is
the base of its residual: additions pass on the side that comes from an input by such a way, and views, casts, slices
and concatenations pass on what they move. So a stream that is concatenated with another for some blocks and cut out
again behind them is followed. Where a layer replaces a stream altogether (long skips do), the base is what enters the
region in its shape; where nothing does, the value is forecast as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..capture.annotate import CUT, ENTER, PROBE
from ..capture.nodes import operand
from ..errors import NoMatchError
from .emit import CONVERT, Emitter, aten
from .liveness import is_impure


@dataclass(frozen=True, eq=False)
class _Skeleton:
    """What would be in a node's place: a value that enters (``entry``), or an operation on such.

    ``size`` is its shape, ``node`` the operation that is done to the ``sources``.
    """

    size: tuple[Any, ...]
    entry: fx.Node | None = None
    node: Any = None
    sources: tuple[_Skeleton | None, ...] = ()

    def entries(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        stack: list[_Skeleton] = [self]
        while stack:
            one = stack.pop()
            if one.entry is not None:
                found.add(one.entry)
            stack.extend(source for source in one.sources if source is not None)
        return found


# Operations that only move or cast what they are given: the skeleton of their value is theirs of the skeleton.
_MOVES = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.permute.default, aten.transpose.int,
    aten.t.default, aten.expand.default, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims,
    aten.unsqueeze.default, aten.slice.Tensor, aten.select.int, aten.clone.default, aten.alias.default,
    aten._to_copy.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.flip.default,
    aten.constant_pad_nd.default, aten.roll.default, aten.detach.default, CONVERT, operator.getitem,
}  # fmt: skip
_LIMITS = {aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.nan_to_num.default}


def resolve(
    gm: fx.GraphModule, varying: Collection[int], residual_probe: bool, fake_mode: AbstractContextManager[Any]
) -> tuple[str, ...]:
    """Give every marker of a residual its base, and leave one probe; changes ``gm``.

    ``varying``: indices of the placeholders that change from step to step. Returns what is worth telling: outputs of
    cut regions that no stream leads to.

    Raises:
        NoMatchError: No stream leads to the probe.
    """
    graph = gm.graph
    entering = graph.find_nodes(op="call_function", target=ENTER)
    emit = Emitter(graph, fake_mode)
    notes = []
    regions = dict.fromkeys(str(node.args[1]) for node in entering)
    skeletons = {region: _skeletons(graph, region) for region in regions}
    latent = _depends_on(graph, varying)
    _choose_probe(graph, skeletons, latent, residual_probe, emit)
    for marker in graph.find_nodes(op="call_function", target=CUT):
        region = str(marker.args[1])
        if region not in regions:
            continue
        base = _base(marker, skeletons[region], emit) or _alike(marker, entering, latent)
        if base is None:
            notes.append(f"{region}:{marker.args[2]} is like nothing that enters: forecast as it is, not as a residual")
        else:
            marker.args = (*marker.args[:3], base)
    for marker in entering:
        marker.replace_all_uses_with(operand(marker))
        graph.erase_node(marker)
    graph.eliminate_dead_code(is_impure_node=is_impure)
    graph.lint()
    gm.recompile()
    return tuple(notes)


def _depends_on(graph: fx.Graph, varying: Collection[int]) -> set[fx.Node]:
    """Nodes behind the largest input that varies: the latents, not the timestep."""
    placeholders = graph.find_nodes(op="placeholder")
    candidates = [placeholders[i] for i in varying if isinstance(placeholders[i].meta.get("val"), torch.Tensor)]
    numel = {node: node.meta["val"].numel() for node in candidates if node.meta["val"].ndim > 1}
    found: set[fx.Node] = set(numel)
    for node in graph.nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _choose_probe(
    graph: fx.Graph,
    skeletons: Mapping[str, Mapping[fx.Node, _Skeleton]],
    latent: set[fx.Node],
    residual: bool,
    emit: Emitter,
) -> None:
    """Of the values that leave a span, the probe looks at the one whose stream comes from the latents."""
    markers = graph.find_nodes(op="call_function", target=PROBE)
    if not markers:
        return
    region = str(markers[0].args[1])
    chosen, base = markers[0], None
    if region in skeletons:
        streams = skeletons[region]
        found = [(marker, streams[operand(marker)]) for marker in markers if operand(marker) in streams]
        # In a graph that begins behind a break the latents are not to be seen: any stream may be theirs.
        found = [(marker, stream) for marker, stream in found if stream.entries() & latent] or found
        if not found:
            raise NoMatchError(
                "no residual stream leads through these blocks",
                where=region,
                hint="probe a module's output or the latents",
            )
        chosen = max(found, key=lambda pair: (_numel(pair[0]), markers.index(pair[0])))[0]  # the last: not a long skip
        if residual:
            base = _base(chosen, streams, emit)
            assert base is not None
    for marker in markers:
        if marker is chosen:
            if base is not None:
                marker.args = (*marker.args[:2], base)
        else:
            marker.replace_all_uses_with(operand(marker))
            graph.erase_node(marker)


def _numel(node: fx.Node) -> int:
    value = node.meta["val"]
    return value.numel() if all(isinstance(size, int) for size in value.shape) else 0


def _skeletons(graph: fx.Graph, region: str) -> dict[fx.Node, _Skeleton]:
    """The skeletons of all nodes that have one, with what enters a region as their ends."""
    found: dict[fx.Node, _Skeleton] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is ENTER and node.args[1] == region:
            found[node] = _Skeleton(_size(node), entry=node)
            continue
        skeleton = _skeleton(node, found)
        if skeleton is not None:
            found[node] = skeleton
    return found


def _size(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _skeleton(node: fx.Node, found: Mapping[fx.Node, _Skeleton]) -> _Skeleton | None:
    target, args = node.target, node.args
    if target in (CUT, ENTER, PROBE) or target in _LIMITS:
        return found.get(args[0])  # pyright: ignore[reportArgumentType]
    if target is aten.add.Tensor:
        return _sum(node, found)
    if target is aten.sub.Tensor:
        minuend = found.get(args[0])  # pyright: ignore[reportArgumentType]
        return minuend if minuend is not None and minuend.size == _size(node) and args[1] not in found else None
    if target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(args[1], (int, float)):
        source = found.get(args[0])  # pyright: ignore[reportArgumentType]
        return None if source is None else _Skeleton(_size(node), node=node, sources=(source,))
    if target is aten.cat.default:
        parts: Any = args[0]
        if not all(part in found for part in parts):
            return None
        return _Skeleton(_size(node), node=node, sources=tuple(found[part] for part in parts))
    if target in _MOVES:
        source = found.get(args[0])  # pyright: ignore[reportArgumentType]
        return None if source is None else _moved(node, source)
    return None


def _sum(node: fx.Node, found: Mapping[fx.Node, _Skeleton]) -> _Skeleton | None:
    """What is added on the way does not count; of two streams the one that has the sum's size, or their sum."""
    sides = [found.get(side) if isinstance(side, fx.Node) else None for side in node.args[:2]]
    known = [side for side in sides if side is not None and side.size == _size(node)]
    if len(known) < 2:
        return known[0] if known else None
    if known[0] is known[1]:
        return known[0]
    return _Skeleton(_size(node), node=node, sources=(known[0], known[1]))


def _moved(node: fx.Node, source: _Skeleton) -> _Skeleton:
    """A slice of a concatenation is the part that was put there."""
    inner, size = source.node, _size(node)
    if inner is not None and inner.target is aten.cat.default:
        part = _part(node, source, (len(inner.args) > 1 and inner.args[1]) or 0)
        if part is not None:
            return part
    if node.target is operator.getitem and inner is not None and inner.target in _SPLITS:
        whole = source.sources[0]
        if whole is not None and whole.node is not None and whole.node.target is aten.cat.default:
            dim = (len(whole.node.args) > 1 and whole.node.args[1]) or 0
            start = sum(_lengths(inner)[: int(node.args[1])])  # pyright: ignore[reportArgumentType]
            part = _covering(whole, dim, start, start + size[dim], _dim(inner))
            if part is not None:
                return part
    return _Skeleton(size, node=node, sources=(source,))


_SPLITS = {aten.split_with_sizes.default, aten.split.Tensor}


def _dim(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 else 0


def _lengths(split: fx.Node) -> list[int]:
    """The lengths of the pieces of a split."""
    values: Any = split.meta["val"]
    dim = _dim(split)
    return [value.shape[dim] for value in values]


def _part(node: fx.Node, source: _Skeleton, dim: Any) -> _Skeleton | None:
    if node.target is not aten.slice.Tensor or (len(node.args) > 4 and node.args[4] != 1):
        return None
    along = node.args[1] if len(node.args) > 1 else 0
    start = (node.args[2] if len(node.args) > 2 else 0) or 0
    end = node.args[3] if len(node.args) > 3 else None
    if not isinstance(start, int) or not isinstance(end, (int, type(None))):
        return None
    length = source.size[along]  # pyright: ignore
    if not isinstance(length, int):
        return None
    start = start + length if start < 0 else start
    end = length if end is None else min(end + length if end < 0 else end, length)
    return _covering(source, dim, start, end, along)


def _covering(cat: _Skeleton, dim: Any, start: int, end: int, along: Any) -> _Skeleton | None:
    """The part of a concatenation that stands exactly from ``start`` to ``end``."""
    rank = len(cat.size)
    if dim % rank != along % rank:
        return None
    at = 0
    for part in cat.sources:
        assert part is not None
        if at == start and at + part.size[dim] == end:
            return part
        at += part.size[dim]
    return None


def _base(marker: fx.Node, skeletons: Mapping[fx.Node, _Skeleton], emit: Emitter) -> fx.Node | None:
    """The skeleton of what a marker marks, as a node in front of it; None if it has none."""
    value = marker.args[0]
    assert isinstance(value, fx.Node)
    skeleton = skeletons.get(value)
    if skeleton is None:
        return None
    with emit.before(marker):
        base = _write(skeleton, emit, {})
    same = base.meta["val"].shape == value.meta["val"].shape and base.meta["val"].dtype == value.meta["val"].dtype
    return base if same else None


def _alike(marker: fx.Node, entering: Sequence[fx.Node], latent: set[fx.Node]) -> fx.Node | None:
    """What enters a cut region in the shape of a value that leaves it; what comes from the latents first."""
    value = marker.meta["val"]
    found = [
        node
        for node in entering
        if node.args[1] == marker.args[1]
        and (node.meta["val"].shape, node.meta["val"].dtype) == (value.shape, value.dtype)
    ]
    found.sort(key=lambda node: node not in latent)
    base = found[0].args[0] if found else None
    return base if isinstance(base, fx.Node) else None


def _write(skeleton: _Skeleton, emit: Emitter, written: dict[_Skeleton, fx.Node]) -> fx.Node:
    if skeleton in written:
        return written[skeleton]
    if skeleton.entry is not None:
        result = skeleton.entry.args[0]
        assert isinstance(result, fx.Node)
    else:
        node = skeleton.node
        assert node is not None
        sources = [_write(source, emit, written) for source in skeleton.sources if source is not None]
        if node.target is aten.cat.default:
            result = emit(node.target, sources, *node.args[1:], **node.kwargs)
        elif node.target is aten.add.Tensor:
            result = emit(node.target, *sources)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            result = emit(aten.reshape.default, sources[0], *node.args[1:])
        else:
            result = emit(node.target, sources[0], *node.args[1:], **node.kwargs)
    written[skeleton] = result
    return result
