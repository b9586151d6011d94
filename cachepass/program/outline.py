"""Outline: stretches of a graph that are the same become calls of one body.

    outline : graph, Repeats, how it is read -> the graph with ``invoke_subgraph``, Bodies

        a = mm(x, w0); b = relu(a)              b = invoke_subgraph(body, x, w0)[0]
        c = mm(b, w1); d = relu(c)      ->      d = invoke_subgraph(body, b, w1)[0]
        e = mm(d, w2); f = relu(e)              f = invoke_subgraph(body, d, w2)[0]

Nothing that a body returns shares memory with anything else that crosses its border: it returns values that own their
memory, and a view of one, or of what went in, is made again outside. What stands between the nodes of a stretch and
reads it, as the write of a slot does, runs behind the call.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import fx

from .. import _torch
from ..capture.nodes import operands
from .repeats import Reading, Repeat


@dataclass(frozen=True, eq=False)
class Body:
    """What the stretches of a repeat have in common, and where they differ.

    Attributes:
        name: Under which the graph finds it.
        repeat: The stretches.
        common: Positions of the nodes whose values are the same in all stretches, and are computed outside, once.
        reading: How the graph is read.
    """

    name: str
    repeat: Repeat
    common: frozenset[int]
    reading: Reading

    @functools.cached_property
    def inside(self) -> list[dict[fx.Node, int]]:
        """For each stretch, the positions of its nodes."""
        return [{node: i for i, node in enumerate(stretch)} for stretch in self.repeat.stretches]

    @functools.cached_property
    def read_outside(self) -> set[int]:
        """Positions of what is read behind some stretch."""
        return {
            i
            for inside, stretch in zip(self.inside, self.repeat.stretches, strict=True)
            for i, node in enumerate(stretch)
            if any(user not in inside for user in node.users)
        }

    @functools.cached_property
    def views(self) -> tuple[int, ...]:
        """Positions of the views that are made again outside: those that are read there, and that these are made of."""
        first, found = self.repeat.stretches[0], set[int]()
        pending = list(self.read_outside - self.common)
        while pending:
            i = pending.pop()
            if self._root(i) is not first[i] and i not in found:
                found.add(i)
                pending += {self.inside[0][s] for s in operands(first[i]) if s in self.inside[0]} - self.common
        return tuple(sorted(found))

    @functools.cached_property
    def returned(self) -> tuple[int, ...]:
        """Positions of the values that the body returns: those that own the memory of what is read outside."""
        first = self.repeat.stretches[0]
        read = {self.inside[0][s] for i in self.views for s in operands(first[i]) if s in self.inside[0]}
        owners = {i for i in self.read_outside | read if self._root(i) is first[i]}
        return tuple(sorted(owners - self.common))

    @functools.cached_property
    def positions(self) -> list[int]:
        """Those of the nodes that the body has: what its results are made of, and all where some write in place."""
        if any(map(self.reading.written, self.repeat.stretches[0])):
            return sorted(self._made)
        needed = set(self.returned)
        for i in reversed(range(len(self.repeat.stretches[0]))):
            if i in needed:
                needed |= {self.inside[0][s] for s in self._sources(0, i) if s in self.inside[0]} - self.common
        return sorted(needed)

    @functools.cached_property
    def inputs(self) -> list[tuple[fx.Node, ...]]:
        """For each input of the body, what every stretch gives there."""
        return list(dict.fromkeys(key for i in self.positions for key in self.given(i) if key is not None))

    def given(self, position: int) -> list[tuple[fx.Node, ...] | None]:
        """For each operand of a node, what the stretches read there; None for what the body itself makes."""
        ways = range(len(self.repeat.stretches))
        groups = zip(*(self._sources(k, position) for k in ways), strict=True)
        return [None if self.inside[0].get(g[0], -1) in self._made else g for g in groups]

    @functools.cached_property
    def _made(self) -> set[int]:
        return set(range(len(self.repeat.stretches[0]))) - self.common

    def _sources(self, k: int, position: int) -> list[fx.Node]:
        """The operands of a node of stretch ``k``; of what is common, the first stretch's."""
        first, inside = self.repeat.stretches[0], self.inside[k]
        found = operands(self.repeat.stretches[k][position])
        return [first[inside[s]] if inside.get(s, -1) in self.common else s for s in found]

    def _root(self, position: int) -> fx.Node:
        return self.reading.root(self.repeat.stretches[0][position])

    def graph(self, key: str) -> fx.Graph:
        """The body as a graph, whose nodes have their values in ``meta[key]``."""
        graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
        placeholders = {}
        for n, given in enumerate(self.inputs):
            placeholders[given] = graph.placeholder(f"in_{n}")
            placeholders[given].meta[key] = self.reading.value(given[0])
        first = self.repeat.stretches[0]
        for i in self.positions:
            sources = iter([None if given is None else placeholders[given] for given in self.given(i)])
            env[first[i]] = graph.node_copy(first[i], lambda source: next(sources) or env[source])  # noqa: B023
        end = graph.output(tuple(env[first[i]] for i in self.returned))
        end.meta["user_visible_output_idxs"] = list(range(len(self.returned)))  # Inductor keeps their strides
        graph.lint()
        return graph


def outline(
    gm: fx.GraphModule,
    repeats: Sequence[Repeat],
    reading: Reading,
    key: str,
    common: Sequence[Collection[int]] = (),
    *,
    name: str = "shared",
) -> tuple[fx.GraphModule, list[Body]]:
    """The graph with calls; ``gm`` is left as it is. ``key``: of the values in ``meta``; ``common``: for each repeat
    the positions of what is computed once; ``name``: how the names of bodies begin."""
    bodies = [
        Body(f"{name}_{n}", repeat, frozenset(common[n] if common else ()), reading) for n, repeat in enumerate(repeats)
    ]
    graph = _Caller(gm.graph, bodies, key).graph
    attributes: dict[str, object] = {
        str(node.target): operator.attrgetter(str(node.target))(gm) for node in gm.graph.find_nodes(op="get_attr")
    }
    for body in bodies:
        attributes[body.name] = _torch.graph_module({}, body.graph(key))  # attributes are given to it, as all inputs
    return _torch.graph_module(attributes, graph), bodies


class _Caller:
    """The graph that calls the bodies."""

    def __init__(self, source: fx.Graph, bodies: Sequence[Body], key: str) -> None:
        self.graph, self._key = fx.Graph(), key
        self._env: dict[fx.Node, fx.Node] = {}
        self._callees: dict[str, fx.Node] = {}
        of = {node: (body, k) for body in bodies for k, inside in enumerate(body.inside) for node in inside}
        behind: list[fx.Node] | None = None  # what waits for the call of a stretch that has begun
        for node in source.nodes:
            if node in of:
                body, k = of[node]
                behind = [] if behind is None else behind
                if k == 0 and body.inside[0][node] in body.common:
                    self._copy(node)
                if node is body.repeat.stretches[k][-1]:
                    self._call(body, k)
                    for waiting in behind:
                        self._copy(waiting)
                    behind = None
            elif behind is not None and self._waits(node, bodies[0].reading):
                behind.append(node)
            else:
                self._copy(node)
        self.graph.output_node().meta = dict(source.output_node().meta)
        self.graph.lint()

    def _waits(self, node: fx.Node, reading: Reading) -> bool:
        return bool(reading.written(node)) or any(source not in self._env for source in node.all_input_nodes)

    def _copy(self, node: fx.Node) -> None:
        self._env[node] = self.graph.node_copy(node, self._env.__getitem__)

    def _call(self, body: Body, k: int) -> None:
        stretch = body.repeat.stretches[k]
        if body.name not in self._callees:
            self._callees[body.name] = self.graph.get_attr(body.name)
        for position in body.common:
            self._env[stretch[position]] = self._env[body.repeat.stretches[0][position]]
        given = [self._env[key[k]] for key in body.inputs]
        call = self.graph.call_function(_torch.INVOKE_SUBGRAPH, (self._callees[body.name], body.name, *given))
        call.meta[self._key] = tuple(body.reading.value(stretch[i]) for i in body.returned)
        for n, i in enumerate(body.returned):
            self._env[stretch[i]] = item = self.graph.call_function(operator.getitem, (call, n), name=stretch[i].name)
            item.meta = dict(stretch[i].meta)
        for i in body.views:
            self._copy(stretch[i])
