"""Regions: the module calls of a Dynamo graph, and what each one is.

    find_regions : Dynamo GraphModule -> RegionTable

Every node carries its ``nn_module_stack``: one entry per module call that it was traced in. A region is all nodes of
one entry; its outputs are its floating-point tensors that are used outside. What a region *is* comes from what it does
(``classify.py``).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping

import torch
from torch import fx

from .. import _torch
from ..methods import Region, Skip
from .classify import RegionTable, classify
from .nodes import target_name

_TOKEN = re.compile(r"\['([^']*)'\]|\[(\d+)\]|\.([A-Za-z_0-9]+)")
_PLUMBING = {"__dict__", "_modules", "_parameters", "_buffers", "_orig_mod"}
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}


def dotted(source: str) -> str:
    """``L['self'].__dict__['_modules']['blocks'].0.attn`` -> ``blocks.0.attn``: a path below the compiled module."""
    match = re.match(r"[LG]\['[^']*'\]", source)
    tokens = ["".join(t) for t in _TOKEN.findall(source[match.end() :] if match else "." + source)]
    if "cell_contents" in tokens:
        tokens = tokens[tokens.index("cell_contents") + 1 :]
    return ".".join(t for t in tokens if t not in _PLUMBING)


def find_regions(gm: fx.GraphModule, paths: Mapping[int, str] | None = None,
                 root: tuple[str, str] | None = None, *, rest: bool = False) -> RegionTable:  # fmt: skip
    """All module calls of a Dynamo graph; those that cannot be cut are in ``skips`` with the reason.

    Modules are named by where the captured code finds them. Where that is only a part of the model, ``paths`` names its
    modules, by their ids, and ``root`` (path, class name) is the module whose call is the whole graph, if there is one;
    or, with ``rest``, the rest of its call behind a graph break.
    """
    table, by_key = RegionTable(), {}
    calls: dict[str, int] = {}
    for node in gm.graph.nodes:
        for key, (name, cls) in _stack(node, paths or {}, root):
            if key not in by_key:
                calls[name] = calls.get(name, -1) + 1
                region_id = name if calls[name] == 0 else f"{name}@{calls[name]}"
                by_key[key] = Region(region_id, name, _class_name(cls))
                table.nodes[region_id] = []
            table.nodes[by_key[key].id].append(node)
    table.regions = list(by_key.values())
    _find_outputs(table, gm)
    owners = {node: [by_key[key].id for key, _ in _stack(node, paths or {}, root)] for node in gm.graph.nodes}
    table.regions = classify(table, owners, projections_missing=rest)
    aliases = Aliases(gm)
    for region in list(table.regions):
        reason = unfit(region, table, aliases)
        if reason is not None:
            table.regions.remove(region)
            table.skips.append(Skip(region.id, reason))
    return table


def _stack(node: fx.Node, paths: Mapping[int, str],
           root: tuple[str, str] | None) -> Iterator[tuple[str, tuple[str, object]]]:  # fmt: skip
    """The module calls around a node, outermost first: a key for each call, the module's path and class. A module that
    is reached by two paths has one key in Dynamo's stack for both calls."""
    if node.op in ("placeholder", "output"):
        return
    if root is not None:
        yield "root", root
    for key, (path, cls) in (node.meta.get("nn_module_stack") or {}).items():
        name = paths.get(_torch.module_of(str(key))) or dotted(path)
        if name:
            yield f"{key} {path}", (name, cls)


def _class_name(cls: object) -> str:
    return cls.__name__ if isinstance(cls, type) else str(cls).rsplit(".", 1)[-1]


def _find_outputs(table: RegionTable, gm: fx.GraphModule) -> None:
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for region in table.regions:
        members = set(table.nodes[region.id])
        # A tuple (chunk, split) is cut element by element: its getitems belong to the region wherever they stand.
        queue = [n for n in members if isinstance(n.meta.get("example_value"), (tuple, list))]
        while queue:
            for user in queue.pop().users:
                if user.target is operator.getitem and user not in members:
                    members.add(user)
                    if isinstance(user.meta.get("example_value"), (tuple, list)):
                        queue.append(user)
        nodes = sorted(members, key=order.__getitem__)
        table.nodes[region.id] = nodes
        table.outputs[region.id] = [
            n for n in nodes
            if is_floating(n.meta.get("example_value")) and any(u not in members for u in n.users)
        ]  # fmt: skip


def is_floating(value: object) -> bool:
    """What can be forecast: integers, masks and sizes that leave a region are always computed."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def unfit(region: Region, table: RegionTable, aliases: Aliases) -> str | None:
    """Why a region cannot be cut, or None."""
    nodes, outputs = table.nodes[region.id], table.outputs[region.id]
    if not outputs:
        return "no floating-point tensor leaves it"
    if any(_torch.depends_on_data(output.meta["example_value"]) for output in outputs):
        return "the size of an output depends on data"
    last = nodes[-1]
    members = set(nodes)
    for output in outputs:
        if any(user not in members and user < last for user in output.users):
            return "its outputs are used before it ends"
    if aliases.writes_outside(nodes, members):
        return "it writes in place to memory that it did not make"
    if aliases.shared_and_written(outputs, nodes[0]):
        return "an output shares memory with an input, and that memory is written in place"
    return None


class Aliases:
    """In-place writes of a Dynamo graph, by the storage that they touch."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.first_node: dict[int, fx.Node] = {}
        self.written: dict[fx.Node, int] = {}
        for node in gm.graph.nodes:
            storage = _storage(node)
            if storage is not None:
                self.first_node.setdefault(storage, node)
            target = _written_argument(node)
            if target is not None and (touched := _storage(target)) is not None:
                self.written[node] = touched

    def writes_outside(self, nodes: list[fx.Node], members: set[fx.Node]) -> bool:
        return any(n in self.written and self.first_node[self.written[n]] not in members for n in nodes)

    def shared_and_written(self, outputs: list[fx.Node], first: fx.Node) -> bool:
        written = set(self.written.values())
        for output in outputs:
            storage = _storage(output)
            if storage in written and storage is not None and self.first_node[storage] < first:
                return True
        return False


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("example_value")
    return _torch.storage_of(value) if isinstance(value, torch.Tensor) else None


def _written_argument(node: fx.Node) -> fx.Node | None:
    """The tensor that a node writes in place, if it does."""
    name = target_name(node)
    in_place = node.op == "call_method" and name.endswith("_") and not name.endswith("__")
    in_place |= node.op == "call_function" and (
        node.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    )
    out = node.kwargs.get("out")
    target = out if isinstance(out, fx.Node) else node.args[0] if in_place and node.args else None
    return target if isinstance(target, fx.Node) else None
