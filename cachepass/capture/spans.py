"""Spans: consecutive blocks as one region of the graph.

    add_span : RegionTable, region with blocks -> the same table, with the nodes and outputs of that region

A span holds the nodes of its blocks, and what between the first and the last of them depends on one: the reshapes and
concatenations with which a model hands its streams from block to block.
"""

from __future__ import annotations

from torch import fx

from ..errors import NoMatchError, listing
from ..recipe.vocabulary import Region
from .aliases import Aliases
from .classify import RegionTable
from .regions import is_floating, unfit


def add_span(gm: fx.GraphModule, table: RegionTable, region: Region) -> None:
    """Find the nodes of a span and the values that leave it.

    Raises:
        NoMatchError: They cannot be left out, with the reason.
    """
    if region.id in table.nodes:
        return
    owned = {node for block in region.blocks for node in table.nodes[block]}
    order = list(gm.graph.nodes)
    first, last = (
        next(i for i, node in walk if node in owned) for walk in (enumerate(order), reversed(list(enumerate(order))))
    )
    members: set[fx.Node] = set()
    for node in order[first : last + 1]:
        if node.op != "placeholder" and (node in owned or any(source in members for source in node.all_input_nodes)):
            members.add(node)
    table.nodes[region.id] = [node for node in order[first : last + 1] if node in members]
    table.outputs[region.id] = [
        node
        for node in table.nodes[region.id]
        if is_floating(node.meta.get("example_value")) and any(user not in members for user in node.users)
    ]
    if not table.outputs[region.id]:
        raise NoMatchError(
            "no floating-point tensor leaves these blocks", where=region.id, hint=f"blocks: {listing(region.blocks)}"
        )
    aliases = Aliases(gm)
    reason = unfit(region, table, aliases)
    if reason is None and aliases.entered_and_written(table.nodes[region.id], members):
        reason = "what enters them is written in place between them"
    if reason is not None:
        raise NoMatchError(
            f"these blocks cannot be left out: {reason}",
            where=region.id,
            hint="choose others, or forecast modules inside of them",
        )
    table.regions.append(region)
