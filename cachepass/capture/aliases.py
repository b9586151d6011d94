"""Aliases: which memory the nodes of a Dynamo graph write in place, and who else sees it.

A marker (``capture/annotate.py``) makes a value of its own of what it stands behind. That is the model's own arithmetic
as long as no later write to one name of the memory has to be seen through another one.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from .. import _torch
from .nodes import nodes_in, target_name

_OPERATORS = ("iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift",
              "isub", "itruediv", "ixor", "setitem", "delitem")  # fmt: skip
_IN_PLACE = {getattr(operator, name) for name in _OPERATORS}
_DUNDER = {f"__{name}__" for name in _OPERATORS}
_KNOWN = ("torch", "_operator", "operator", "math", "builtins")  # what a name ending in "_" says of these is true


class Aliases:
    """In-place writes of a Dynamo graph, by the storages that they touch."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.first_node: dict[int, fx.Node] = {}
        self.written: dict[fx.Node, set[int]] = {}
        for node in gm.graph.nodes:
            storage = storage_of(node)
            if storage is not None:
                self.first_node.setdefault(storage, node)
            touched = [storage_of(target) for target in written_arguments(node)]
            if any(s is not None for s in touched):
                self.written[node] = {s for s in touched if s is not None}

    def writes_outside(self, nodes: Sequence[fx.Node], members: Collection[fx.Node]) -> bool:
        """A region writes memory that it did not make."""
        return any(self.first_node[s] not in members for node in nodes for s in self.written.get(node, ()))

    def shared_and_written(self, outputs: Sequence[fx.Node], first: fx.Node) -> bool:
        """An output is memory from in front of the region, which some node writes."""
        shared = {s for s in map(storage_of, outputs) if s is not None and self.first_node[s] < first}
        return bool(shared & self._written_by(self.written))

    def shared_outputs_written(self, nodes: Sequence[fx.Node], members: Collection[fx.Node]) -> bool:
        """Two values that leave a region are the same memory, which is written behind it: each one's marker would see
        the writes to itself alone."""
        behind = self._written_by(node for node in self.written if node > nodes[-1])
        leaving = [storage_of(n) for n in nodes if any(user not in members for user in n.users)]
        return any(leaving.count(storage) > 1 for storage in behind)

    def entered_and_written(self, nodes: Sequence[fx.Node], members: Collection[fx.Node]) -> bool:
        """What flows into a span of blocks is written by something between them, so later blocks are given another
        value than the first one."""
        between = self._written_by(n for n in self.written if nodes[0] < n < nodes[-1] and n not in members)
        entering = {storage_of(source) for node in nodes for source in node.all_input_nodes if source not in members}
        return bool(between & entering)

    def is_written(self, node: fx.Node) -> bool:
        """Something writes a value's memory."""
        return storage_of(node) in self._written_by(self.written)

    def _written_by(self, nodes: Iterable[fx.Node]) -> set[int]:
        return {storage for node in nodes for storage in self.written[node]}


def storage_of(node: fx.Node) -> int | None:
    """An identity of the memory of a node's value, if it is a tensor."""
    value = node.meta.get("example_value")
    return _torch.storage_of(value) if isinstance(value, torch.Tensor) else None


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node writes in place: by its operator's schema, by ``inplace=True`` and ``out=``, by torch's
    rule for names, and of functions that are not torch's by calling them on tensors without data."""
    if node.op == "call_method":
        name = target_name(node)
        in_place = name in _DUNDER or (name.endswith("_") and not name.endswith("__"))
        return [*(nodes_in(node.args[:1]) if in_place else ()), *nodes_in(node.kwargs.get("out"))]
    if node.op != "call_function":
        return []
    target: Any = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return _written_by_nested(node)
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return _written_by_schema(node, target)
    return _written_by_function(node, target)


def _written_by_schema(node: fx.Node, target: torch._ops.OpOverload | torch._ops.OpOverloadPacket) -> list[fx.Node]:
    """What any overload of a packet would write."""
    is_one = isinstance(target, torch._ops.OpOverload)
    overloads = [target] if is_one else [getattr(target, name) for name in target.overloads()]
    found: dict[fx.Node, None] = {}
    for overload in overloads:
        for i, argument in enumerate(overload._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                positional = node.args[i] if not argument.kwarg_only and i < len(node.args) else None
                found.update(dict.fromkeys(nodes_in((positional, node.kwargs.get(argument.name)))))
    return list(found)


def _written_by_function(node: fx.Node, target: Callable[..., Any]) -> list[fx.Node]:
    name, given = target_name(node), nodes_in(node.kwargs.get("out"))
    first = node.args[:1] or (node.kwargs.get("input"), node.kwargs.get("self"))
    if target in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or _is_in_place(node, target):
        return [*given, *nodes_in(first)]
    module = getattr(target, "__module__", None) or "builtins"
    if module.split(".")[0] in _KNOWN or not callable(target):
        return list(given)
    return [*given, *_written_by_foreign(node, target)]


def _is_in_place(node: fx.Node, target: Callable[..., Any]) -> bool:
    """``F.relu(x, inplace=True)``, however the argument is given."""
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    position = _position_of_inplace(target)
    return position is not None and position < len(node.args) and bool(node.args[position])


@functools.cache
def _position_of_inplace(target: Callable[..., Any]) -> int | None:
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # a builtin, which has no such argument
        return None
    return names.index("inplace") if "inplace" in names else None


def _written_by_foreign(node: fx.Node, target: Callable[..., Any]) -> list[fx.Node]:
    """A function that Dynamo was told to leave as it is (``allow_in_graph``) has neither schema nor rule: it is called
    on tensors without data, whose versions tell. One that cannot be called so may write all that it is given."""
    examples: dict[fx.Node, Any] = {n: n.meta.get("example_value") for n in node.all_input_nodes}
    operands = [n for n, value in examples.items() if isinstance(value, torch.Tensor)]
    fakes = dict(examples)
    try:
        with _torch.fake_mode_of(list(examples.values())), torch.inference_mode(False), torch.no_grad():
            for operand in operands:
                like = examples[operand]
                fakes[operand] = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
            before = [fakes[operand]._version for operand in operands]
            args, kwargs = fx.map_arg((node.args, node.kwargs), fakes.__getitem__)
            target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
    except Exception:
        return operands
    return [n for n, version in zip(operands, before, strict=True) if fakes[n]._version != version]


def _written_by_nested(node: fx.Node) -> list[fx.Node]:
    """An operator on graphs writes what it is given if a graph of its does, or (a kernel of the user's) it says so."""
    owner = node.graph.owning_module
    nested = [getattr(owner, str(n.target), None) for n in node.all_input_nodes if n.op == "get_attr"]
    writes = "mutation" in target_name(node)
    for graph_module in nested:
        if isinstance(graph_module, fx.GraphModule):
            aliases = Aliases(graph_module)
            writes |= any(map(aliases.is_written, graph_module.graph.find_nodes(op="placeholder")))
    return [n for n in node.all_input_nodes if storage_of(n) is not None] if writes else []


__all__ = ["Aliases", "storage_of", "written_arguments"]
