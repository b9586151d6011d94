"""Fold: blocks that are the same are traced once.

    fold   : Dynamo GraphModule -> the same with calls of bodies (``program/outline.py``), what was folded
    unfold : ATen GraphModule with calls -> without them

AOTAutograd runs every operation of a graph several times on tensors without data: that is most of its time, and grows
with the depth of the model. Of a body it runs each once. Behind it the bodies' ATen nodes are copied to where they are
called, so every later pass sees one straight line, as it would without.

The markers of cuts name their regions, which differ from block to block: in a body they have the first block's, and
``unfold`` writes each block's own.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import _torch
from ..capture.aliases import written_arguments
from ..capture.annotate import CUT, ENTER, PROBE
from ..capture.nodes import returned_by, target_name
from .outline import Body, outline
from .repeats import find_repeats

_MARKERS = (CUT, ENTER)
_NUMBERS = itertools.count()
_RANDOM = ("rand", "bernoulli", "multinomial", "normal", "dropout")


@dataclass(frozen=True)
class Folded:
    """A Dynamo graph with calls, and the bodies that it calls."""

    gm: fx.GraphModule
    bodies: tuple[Body, ...]


class Dynamo:
    """How a Dynamo graph is read: memory is told by the storages of its fake values."""

    def __init__(self, graph: fx.Graph) -> None:
        self._roots: dict[fx.Node, fx.Node] = {}
        self._written = {node: written_arguments(node) for node in graph.nodes}
        for node in graph.nodes:
            own = set(_storages(node))
            views = node.target not in (*_MARKERS, PROBE)  # what a marker gives is a value of its own
            source = next((s for s in node.all_input_nodes if views and own & set(_storages(s))), None)
            self._roots[node] = node if source is None else self._roots[source]

    def value(self, node: fx.Node) -> object:
        return node.meta.get("example_value")

    def root(self, node: fx.Node) -> fx.Node:
        return self._roots[node]

    def may_move(self, node: fx.Node) -> bool:
        if node.op not in ("call_function", "call_method") or isinstance(node.target, torch._ops.HigherOrderOperator):
            return False
        has_values = bool(self._written[node]) or any(True for _ in _tensors(node))
        return has_values and node.target is not PROBE and not _is_random(node)

    def written(self, node: fx.Node) -> Sequence[fx.Node]:
        return self._written[node]

    def constant(self, node: fx.Node, index: int) -> bool:
        return node.target not in _MARKERS or index != 1


def _tensors(node: fx.Node) -> Iterator[torch.Tensor]:
    value = node.meta.get("example_value")
    for leaf in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(leaf, torch.Tensor):
            yield leaf


def _storages(node: fx.Node) -> Iterator[int]:
    return map(_torch.storage_of, _tensors(node))


def _is_random(node: fx.Node) -> bool:
    """It draws numbers; dropout does in training alone."""
    if target_name(node) == "dropout" and (node.kwargs.get("training", True), *node.args[2:3])[-1] is False:
        return False
    return any(word in target_name(node) for word in _RANDOM)


def fold(gm: fx.GraphModule) -> Folded:
    """A graph with each repeat as calls of one body; without bodies where nothing repeats or a body could not be traced
    for itself: where values are tensors around others, or a mode changes within the graph."""
    if not _may_fold(gm.graph):
        return Folded(gm, ())
    reading = Dynamo(gm.graph)
    repeats = find_repeats(gm.graph, reading)
    if not repeats:
        return Folded(gm, ())
    # AOTAutograd remembers bodies by their names, and may trace several graphs of one model.
    outlined, bodies = outline(gm, repeats, reading, "example_value", name=f"folded_{next(_NUMBERS)}")
    outlined.meta = dict(gm.meta)
    return Folded(outlined, tuple(bodies))


def _may_fold(graph: fx.Graph) -> bool:
    for node in graph.nodes:
        value, is_call = node.meta.get("example_value"), node.op in ("call_function", "call_method")
        if is_call and value is None and not written_arguments(node):
            return False  # it has an effect
        if isinstance(value, torch.Tensor) and _torch.is_wrapper(value):
            return False
    return True


def unfold(gm: fx.GraphModule, bodies: Sequence[Body]) -> fx.GraphModule | None:
    """An ATen graph with the bodies' nodes where they are called, and each block's own names in its markers; None: some
    call is gone, so which is which block's cannot be told."""
    graph, env = fx.Graph(), dict[fx.Node, Any]()
    calls = {body.name: 0 for body in bodies}
    by_name = {body.name: body for body in bodies}
    for node in gm.graph.nodes:
        if node.target is _torch.INVOKE_SUBGRAPH:
            callee, name, *given = node.args
            body, k = by_name[str(name)], calls[str(name)]
            calls[str(name)] += 1
            inner = gm.get_submodule(str(callee.target))
            assert isinstance(inner, fx.GraphModule)
            env[node] = _inline(inner, [env[source] for source in given], graph, _regions(body, k))
        elif node.target is operator.getitem and isinstance(env[node.args[0]], tuple):
            env[node] = env[node.args[0]][node.args[1]]
        elif node.op == "get_attr" and all(user.target is _torch.INVOKE_SUBGRAPH for user in node.users):
            continue
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
    if any(calls[body.name] != len(body.repeat.stretches) for body in bodies):
        return None
    graph.output_node().meta = dict(gm.graph.output_node().meta)
    graph.lint()
    return _torch.graph_module(gm, graph)


def _regions(body: Body, k: int) -> dict[str, str]:
    """What the regions that a body's markers name are called in one of its stretches."""
    first, own = body.repeat.stretches[0], body.repeat.stretches[k]
    marked = [i for i in body.positions if first[i].target in _MARKERS]
    return {str(first[i].args[1]): str(own[i].args[1]) for i in marked}


def _inline(
    body: fx.GraphModule, given: Sequence[fx.Node], graph: fx.Graph, regions: dict[str, str]
) -> tuple[fx.Node, ...]:
    """Copy a body's nodes for one call; what it returns.

    The copies have the fake values of the body's nodes, which say all but whose memory it is; what leaves the body has
    values of its own.
    """
    env: dict[fx.Node, fx.Node] = {}
    sources = iter(given)
    for node in body.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(sources)
        elif node.op != "output":
            env[node] = graph.node_copy(node, env.__getitem__)
            if node.target in _MARKERS:
                env[node].update_arg(1, regions[str(node.args[1])])
    returned = tuple(env[value] for value in returned_by(body.graph))
    for node in returned:
        value = node.meta["val"]
        with _torch.fake_mode_of([value]), torch.no_grad():
            node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return returned
