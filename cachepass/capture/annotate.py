"""Annotate: put ``cachepass::cut(value, region, output)`` behind the outputs of each chosen module.

    annotate : Dynamo GraphModule, targets -> the same GraphModule, cut

        attn = ...attention of blocks.0...            attn = ...
        add = x + attn                       ->       cut = cachepass.cut(attn, "blocks.0.attn", 0)
                                                      add = x + cut

The marker makes a region a cut in the dataflow instead of a set of nodes, and it survives functionalisation,
decompositions and autocast untouched: in the ATen graph its operand is the region's value, whatever became of the
region. It is pure and its result never aliases its operand, so no pass may move a write across it.

Where a residual is forecast, or probed, ``cachepass::enter`` marks what flows into the region too, and
``program/streams.py`` finds in the ATen graph which of it each output is to be compared with: the ``base`` of its
marker.
``cachepass::probe`` marks the value that a decision looks at.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import fx
from torch.library import custom_op

from ..recipe.vocabulary import Skip, Target
from .aliases import Aliases
from .regions import RegionTable


@custom_op("cachepass::cut", mutates_args=())
def cut(value: torch.Tensor, region: str, output: int, base: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG001 (they name the cut)
    """Identity; stands for "this value may be replaced by a forecast", or by ``base`` and a forecast."""
    return value.clone()


@cut.register_fake
def _fake_cut(value: torch.Tensor, region: str, output: int, base: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG001
    return torch.empty_like(value)


@custom_op("cachepass::enter", mutates_args=())
def enter(value: torch.Tensor, region: str) -> torch.Tensor:  # noqa: ARG001
    """Identity; the value flows into a region whose residual is asked for."""
    return value.clone()


@enter.register_fake
def _fake_enter(value: torch.Tensor, region: str) -> torch.Tensor:  # noqa: ARG001
    return torch.empty_like(value)


@custom_op("cachepass::probe", mutates_args=())
def probe(value: torch.Tensor, region: str, base: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG001
    """Identity; a decision looks at this value, or at its difference to ``base``."""
    return value.clone()


@probe.register_fake
def _fake_probe(value: torch.Tensor, region: str, base: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG001
    return torch.empty_like(value)


CUT = torch.ops.cachepass.cut.default
ENTER = torch.ops.cachepass.enter.default
PROBE = torch.ops.cachepass.probe.default
LATENTS = "(latents)"  # the region of a probe that looks at the model's input
MODEL_OUTPUT = "(model output)"  # and of one that looks at what it returns
OUTPUT = "(output)"  # the region of the model's own output


def outermost(targets: tuple[Target, ...], table: RegionTable) -> tuple[list[Target], list[Skip]]:
    """Drop targets inside other targets: where the outer one is predicted they do not exist, and where it is computed
    they are computed."""
    kept, skips = [], []
    for target in targets:
        region = target.region.id
        outer = next(
            (
                t.region.id
                for t in targets
                if t.region.id != region and table.inside(region, t.region.id) and not table.inside(t.region.id, region)
            ),
            None,
        )
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


def annotate_entry(gm: fx.GraphModule, region: str, table: RegionTable, own: Collection[fx.Node]) -> fx.GraphModule:
    """Mark the activations that flow into a region; ``own`` are the placeholders that are no parameters."""
    members = set(table.nodes[region])
    seen: set[fx.Node] = set()
    for node in table.nodes[region]:
        for value in node.all_input_nodes:
            if value in seen or value in members or not _flows(value, own):
                continue
            with gm.graph.inserting_before(node):  # not earlier: it may be written in place up to here
                marker = gm.graph.call_function(ENTER, (value, region))
            seen |= {value, marker}
            marker.meta = {k: v for k, v in value.meta.items() if k in ("example_value", "nn_module_stack")}
            value.replace_all_uses_with(marker, lambda user: user in members)
    gm.graph.lint()
    gm.recompile()
    return gm


def annotate_probe(gm: fx.GraphModule, region: str, values: Sequence[fx.Node], table: RegionTable) -> fx.GraphModule:
    """Mark outputs of a region at which a decision may look: at its end, where they are what its readers see."""
    members = set(table.nodes[region])
    anchor = table.nodes[region][-1]
    for value in values:
        with gm.graph.inserting_after(anchor):
            anchor = _marker(gm, value, region)
        value.replace_all_uses_with(anchor, lambda user: user not in members and user is not anchor)  # noqa: B023
    gm.graph.lint()
    gm.recompile()
    return gm


def annotate_probe_of_input(gm: fx.GraphModule, value: fx.Node) -> fx.GraphModule:
    """Mark one of the model's inputs, as the model is given it."""
    first = next(node for node in gm.graph.nodes if node.op != "placeholder")
    with gm.graph.inserting_before(first):
        marker = _marker(gm, value, LATENTS)
        if not Aliases(gm).is_written(value):
            value.replace_all_uses_with(marker, lambda user: user is not marker)
        else:
            # The caller sees these writes, so they must reach the input itself. The marker is written back, so that
            # something reads it.
            gm.graph.call_method("copy_", (value, marker)).meta = {"example_value": value.meta["example_value"]}
    gm.graph.lint()
    gm.recompile()
    return gm


def annotate_probe_of_output(gm: fx.GraphModule, value: fx.Node) -> fx.GraphModule:
    """Mark a value that the model returns, as it is returned."""
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        marker = _marker(gm, value, MODEL_OUTPUT)
    output.args = (fx.map_arg(output.args[0], lambda node: marker if node is value else node),)
    gm.graph.lint()
    gm.recompile()
    return gm


def _marker(gm: fx.GraphModule, value: fx.Node, region: str) -> fx.Node:
    marker = gm.graph.call_function(PROBE, (value, region))
    marker.meta = {k: v for k, v in value.meta.items() if k in ("example_value", "nn_module_stack")}
    return marker


def _flows(value: fx.Node, own: Collection[fx.Node]) -> bool:
    """An activation: a floating-point tensor that is no parameter."""
    example = value.meta.get("example_value")
    activation = value in own if value.op == "placeholder" else value.op != "get_attr"
    return activation and isinstance(example, torch.Tensor) and example.is_floating_point()


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
