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
from ..recipe.vocabulary import Region, Skip
from .aliases import Aliases
from .classify import RegionTable, classify

_TOKEN = re.compile(r"\['([^']*)'\]|\[(\d+)\]|\.([A-Za-z_0-9]+)")
_PLUMBING = {"__dict__", "_modules", "_parameters", "_buffers", "_orig_mod"}


def dotted(source: str) -> str:
    """``L['self'].__dict__['_modules']['blocks'].0.attn`` -> ``blocks.0.attn``: a path below the compiled module."""
    match = re.match(r"[LG]\['[^']*'\]", source)
    tokens = ["".join(t) for t in _TOKEN.findall(source[match.end() :] if match else "." + source)]
    if "cell_contents" in tokens:
        tokens = tokens[tokens.index("cell_contents") + 1 :]
    return ".".join(t for t in tokens if t not in _PLUMBING)


def find_regions(
    gm: fx.GraphModule,
    paths: Mapping[int, str] | None = None,
    root: tuple[str, str] | None = None,
    *,
    rest: bool = False,
) -> RegionTable:
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


def _stack(
    node: fx.Node, paths: Mapping[int, str], root: tuple[str, str] | None
) -> Iterator[tuple[str, tuple[str, object]]]:
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
            n for n in nodes if is_floating(n.meta.get("example_value")) and any(u not in members for u in n.users)
        ]


def is_floating(value: object) -> bool:
    """What can be forecast: integers, masks and sizes that leave a region are always computed."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def unfit(region: Region, table: RegionTable, aliases: Aliases) -> str | None:
    """Why a region cannot be cut, or None."""
    nodes, outputs = table.nodes[region.id], table.outputs[region.id]
    if not outputs:
        return "no floating-point tensor leaves it"
    last = nodes[-1]
    members = set(nodes)
    for output in outputs:
        if any(user not in members and user < last for user in output.users):
            return "its outputs are used before it ends"
    if aliases.writes_outside(nodes, members):
        return "it writes in place to memory that it did not make"
    if aliases.shared_and_written(outputs, nodes[0]):
        return "an output shares memory with an input, and that memory is written in place"
    if aliases.shared_outputs_written(nodes, members):
        return "two of its outputs share memory, and that memory is written in place behind it"
    return None
