"""Share: blocks that are the same are compiled once.

    share : ATen GraphModule of a program -> the same with calls of bodies, and what is shared

Each repeat (``program/repeats.py``) becomes calls of one body (``program/outline.py``), which Inductor lowers once,
whatever the depth of the model. Slots are written outside. What is the same in all blocks, such as the activation of
the timestep's embedding, is computed once before the first of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..capture.nodes import operands
from .emit import alias_root
from .kept import bytes_of_value, is_heavy
from .liveness import is_impure
from .outline import outline
from .repeats import Repeat, find_repeats


@dataclass(frozen=True)
class Shared:
    """A body that a program calls for all stretches of its graph that are the same.

    Attributes:
        calls: How often.
        operations: ATen operations of each stretch.
    """

    calls: int
    operations: int

    @staticmethod
    def of(repeats: Sequence[Repeat]) -> tuple[Shared, ...]:
        """For each repeat its body."""
        return tuple(Shared(len(repeat.stretches), len(repeat.stretches[0])) for repeat in repeats)

    @staticmethod
    def told(shared: Sequence[Shared]) -> str:
        """For people."""
        if not shared:
            return ""
        bodies = f"{len(shared)} program{'s' * (len(shared) > 1)}"
        return f"{sum(body.calls for body in shared)} blocks, {bodies}"


_SMALL = 2**16  # bytes that are sooner read than a kernel is started


class Aten:
    """How an ATen graph is read."""

    def value(self, node: fx.Node) -> object:
        return node.meta.get("val")

    def root(self, node: fx.Node) -> fx.Node:
        return alias_root(node)

    def may_move(self, node: fx.Node) -> bool:
        if node.op != "call_function" or not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
            return False
        if isinstance(node.target, torch._ops.HigherOrderOperator) or is_impure(node) or _reads_a_number(node):
            return False
        return not _is_random(node)

    def written(self, node: fx.Node) -> Sequence[fx.Node]:
        if node.op != "call_function" or not is_impure(node):
            return ()
        given = zip(node.target._schema.arguments, node.args, strict=False)  # pyright: ignore
        return [arg for schema, arg in given if isinstance(arg, fx.Node) and schema.is_write]

    def constant(self, node: fx.Node, index: int) -> bool:  # noqa: ARG002
        return True


def _is_random(node: fx.Node) -> bool:
    """It draws numbers. Attention is tagged so too, for its dropout, of which a model that is not trained has none."""
    target = node.target
    seeded = isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags
    return seeded and "attention" not in str(target)


def _reads_a_number(node: fx.Node) -> bool:
    """It takes one number out of an input, as forecasts take their weights. Each block may take another one, so this
    stays outside of all."""
    value = node.meta["val"]
    sources = node.all_input_nodes
    is_number = isinstance(value, torch.Tensor) and value.ndim == 0
    return is_number and len(sources) == 1 and sources[0].op == "placeholder"


def share(gm: fx.GraphModule) -> tuple[fx.GraphModule, tuple[Shared, ...]]:
    """The graph with each repeat as calls of one body; ``gm`` is left as it is, and returned where nothing repeats."""
    repeats = repeated_blocks(gm.graph)
    if not repeats:
        return gm, ()
    outlined, _ = outline(gm, repeats, Aten(), "val", [set(_common(repeat)) for repeat in repeats])
    return outlined, Shared.of(repeats)


def repeated_blocks(graph: fx.Graph) -> list[Repeat]:
    """The repeats of a program's graph that are worth a call: there is real work in them."""
    return [repeat for repeat in find_repeats(graph, Aten()) if any(map(is_heavy, repeat.stretches[0]))]


def _common(repeat: Repeat) -> Iterator[int]:
    """Positions of what has the same value in all stretches: it is made of nothing but what all of them read alike.

    Views alone are as cheap inside, and what is large, and larger than all that it is made of, is cheaper to compute
    where it is read.
    """
    first = repeat.stretches[0]
    inside = {node: i for i, node in enumerate(first)}
    same: set[int] = set()
    for i, node in enumerate(first):
        groups = list(zip(*(operands(stretch[i]) for stretch in repeat.stretches), strict=True))
        alike = all(inside[g[0]] in same if g[0] in inside else len(set(g)) == 1 for g in groups)
        small = bytes_of_value(node) <= max(_SMALL, sum(bytes_of_value(g[0]) for g in groups))
        if groups and alike and (is_heavy(node) or small):
            same.add(i)
    outside: set[int] = set()
    for i in sorted(same, reverse=True):
        if alias_root(first[i]) is first[i] or any(inside.get(user) in outside for user in first[i].users):
            outside.add(i)
    tuples = [first[i] for i in outside if not isinstance(first[i].meta["val"], torch.Tensor)]
    outside |= {inside[item] for node in tuples for item in node.users}  # tensors alone go in
    yield from outside
