"""Annotate: put ``cachepass::cut(value, region, output)`` behind the outputs of each chosen module.

    annotate : Dynamo GraphModule, targets -> the same GraphModule, cut

        attn = ...attention of blocks.0...            attn = ...
        add = x + attn                       ->       cut = cachepass.cut(attn, "blocks.0.attn", 0)
                                                      add = x + cut

The marker makes a region a cut in the dataflow instead of a set of nodes, and it survives functionalisation,
decompositions and autocast untouched: in the ATen graph its operand is the region's value, whatever became of the
region. It is pure and its result never aliases its operand, so no pass may move a write across it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch.library import custom_op

from ..methods import Skip, Target
from .regions import RegionTable


@custom_op("cachepass::cut", mutates_args=())
def cut(value: torch.Tensor, region: str, output: int) -> torch.Tensor:  # noqa: ARG001 (they name the cut)
    """Identity; stands for "this value may be replaced by a forecast"."""
    return value.clone()


@cut.register_fake
def _fake_cut(value: torch.Tensor, region: str, output: int) -> torch.Tensor:  # noqa: ARG001
    return torch.empty_like(value)


CUT = torch.ops.cachepass.cut.default
OUTPUT = "(output)"  # the region of the model's own output


def outermost(targets: tuple[Target, ...], table: RegionTable) -> tuple[list[Target], list[Skip]]:
    """Drop targets inside other targets: where the outer one is predicted they do not exist, and where it is computed
    they are computed."""
    kept, skips = [], []
    for target in targets:
        region = target.region.id
        outer = next((t.region.id for t in targets if t.region.id != region and table.inside(region, t.region.id)
                      and not table.inside(t.region.id, region)), None)  # fmt: skip
        if outer is None:
            kept.append(target)
        else:
            skips.append(Skip(region, f"inside {outer}, which is cut"))
    return kept, skips


def annotate(gm: fx.GraphModule, targets: list[Target], table: RegionTable) -> fx.GraphModule:
    """Insert the marker behind every tensor that leaves a target's region."""
    for target in targets:
        region = target.region.id
        members = set(table.nodes[region])
        anchor = table.nodes[region][-1]
        for index, value in enumerate(table.outputs[region]):
            with gm.graph.inserting_after(anchor):
                marker = gm.graph.call_function(CUT, (value, region, index))
            marker.meta = {k: v for k, v in value.meta.items() if k in ("example_value", "nn_module_stack")}
            value.replace_all_uses_with(marker, lambda user: user not in members and user is not marker)  # noqa: B023
            anchor = marker
    gm.graph.lint()
    gm.recompile()
    return gm


def annotate_output(gm: fx.GraphModule, values: Sequence[fx.Node]) -> fx.GraphModule:
    """Put the marker, as region ``OUTPUT``, between the given values and the graph's output."""
    output = gm.graph.output_node()
    markers: dict[fx.Node, fx.Node] = {}
    with gm.graph.inserting_before(output):
        for index, value in enumerate(values):
            marker = markers[value] = gm.graph.call_function(CUT, (value, OUTPUT, index))
            marker.meta = {k: v for k, v in value.meta.items() if k == "example_value"}
    output.args = (fx.map_arg(output.args[0], lambda node: markers.get(node, node)),)
    gm.graph.lint()
    gm.recompile()
    return gm
