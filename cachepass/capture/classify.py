"""Classify: what a region is - an attention, a cross-attention, a feed-forward, a block - from what it does.

An attention is the module that owns an attention computation: a call of a kernel (scaled_dot_product_attention,
flex_attention, multi_head_attention_forward), or a softmax between two matrix products. It is a cross-attention if the
activations that its keys are projected from and those that its queries are projected from have nothing in common. A
block is an entry of a list of modules that holds one of these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from .. import _torch
from ..recipe.vocabulary import Region, Skip
from .nodes import target_name

_ATTENTION_CLASS = re.compile(r"(Attention|Attn)(\d*D?)$")
_MLP_CLASS = re.compile(r"(feed_?forward|mlp|ffn)", re.IGNORECASE)
_MLP_NAME = re.compile(r"(ff|ffn|mlp|feed_?forward)(_\w+)?$", re.IGNORECASE)
_LINEAR = {torch.nn.functional.linear, torch.matmul, torch.bmm, torch.addmm, torch.mm}
_KERNELS = ("scaled_dot_product_attention", "flex_attention", "multi_head_attention_forward")
_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")
_KEEPS_PRODUCT = {
    "mul", "imul", "truediv", "itruediv", "div", "add", "iadd", "sub", "isub", "masked_fill", "masked_fill_", "where",
    "float", "half", "to", "type_as", "dropout", "contiguous", "clamp", "tanh",
    "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "permute", "transpose", "getitem",
}  # fmt: skip

Operands = tuple[fx.Node, fx.Node]


@dataclass
class RegionTable:
    """The regions of a Dynamo graph in the order of their first nodes, with the nodes and the outputs of each."""

    regions: list[Region] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    nodes: dict[str, list[fx.Node]] = field(default_factory=dict)
    outputs: dict[str, list[fx.Node]] = field(default_factory=dict)

    def inside(self, inner: str, outer: str) -> bool:
        """All nodes of ``inner`` are nodes of ``outer`` too."""
        return self.nodes[inner][0] in self._members(outer) and self.nodes[inner][-1] in self._members(outer)

    def _members(self, region: str) -> set[fx.Node]:
        return self._member_cache.setdefault(region, set(self.nodes[region]))

    _member_cache: dict[str, set[fx.Node]] = field(default_factory=dict, repr=False)


def classify(
    table: RegionTable, owners_of: Mapping[fx.Node, Sequence[str]], *, projections_missing: bool = False
) -> list[Region]:
    """The table's regions with their kinds. ``owners_of``: the ids of the regions around a node, outermost first.

    ``projections_missing``: the graph may begin behind the projections of queries and keys; where they are not seen, an
    attention is taken for self-attention.
    """
    kinds: dict[str, Region] = {}
    for region in table.regions:
        leaf = region.path.rsplit(".", 1)[-1]
        named = _MLP_CLASS.search(region.class_name) or _MLP_NAME.match(leaf)
        if named and _linears(table.nodes[region.id]) >= 2:
            kinds[region.id] = replace(region, is_mlp=True)
    mlps = list(kinds)
    owners = _attention_owners(table, owners_of)
    for region in table.regions:
        kernel = owners.get(region.id)
        if kernel is None and not _attention_by_class(region, table, owners):
            continue
        # A block that calls the kernel itself, beside its feed-forward, is no attention: more would be skipped.
        if any(m != region.id and table.inside(m, region.id) for m in mlps):
            continue
        members = set(table.nodes[region.id])
        cross = kernel is not None and _is_cross(*kernel, members, only_projected=projections_missing)
        kinds[region.id] = replace(region, is_attention=True, is_cross=cross, is_mlp=False)
    # A feed-forward inside an attention (or another feed-forward) belongs to it.
    marked = [r for r in kinds.values() if r.is_attention or r.is_mlp]
    for region in marked:
        if region.is_mlp and any(o.id != region.id and table.inside(region.id, o.id) for o in marked):
            kinds[region.id] = replace(region, is_mlp=False)
    parts = [*owners, *(r.id for r in kinds.values() if r.is_attention or r.is_mlp)]
    for region in _blocks(table, parts):
        kinds[region.id] = replace(kinds.get(region.id, region), is_block=True)
    return [kinds.get(r.id, r) for r in table.regions]


def _blocks(table: RegionTable, parts: Sequence[str]) -> list[Region]:
    """Entries of lists of modules (their names are numbers) around an attention or a feed-forward, the outermost."""
    blocks: list[Region] = []
    for region in table.regions:
        is_entry = region.path.rsplit(".", 1)[-1].isdigit()
        holds = any(part == region.id or table.inside(part, region.id) for part in parts)
        if is_entry and holds and not any(table.inside(region.id, block.id) for block in blocks):
            blocks.append(region)
    return blocks


def _attention_owners(table: RegionTable, owners_of: Mapping[fx.Node, Sequence[str]]) -> dict[str, Operands]:
    """Regions that own an attention: the innermost module around it that has parameters of its own."""
    owners: dict[str, Operands] = {}
    for node, around in owners_of.items():
        operands = attention_operands(node)
        if operands is None:
            continue
        chain = list(around)
        while len(chain) > 1 and not _uses_parameters(table.nodes[chain[-1]]):
            chain.pop()
        if chain:
            owners.setdefault(chain[-1], operands)
    return owners


def attention_operands(node: fx.Node) -> Operands | None:
    """Query and key of an attention that is computed at this node: a kernel's call, or a softmax over ``q k^T`` whose
    result is multiplied with values."""
    if node.op not in ("call_function", "call_method"):
        return None
    name = target_name(node)
    if any(kernel in name for kernel in _KERNELS):
        operands = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node)]
        query, key = node.kwargs.get("query", operands[0]), node.kwargs.get("key", operands[1])
        assert isinstance(query, fx.Node) and isinstance(key, fx.Node)
        return query, key
    if name not in ("softmax", "_softmax"):
        return None
    scores = _search(node, lambda n: n.all_input_nodes)
    if scores is None or _search(node, lambda n: list(n.users)) is None:
        return None
    operands = [a for a in scores.all_input_nodes if isinstance(a.meta.get("example_value"), torch.Tensor)]
    return (operands[-2], operands[-1]) if len(operands) >= 2 else (operands[0], operands[0])


def _search(start: fx.Node, neighbours: Callable[[fx.Node], list[fx.Node]]) -> fx.Node | None:
    """The nearest matrix product of two activations from ``start``, through scaling, masking and reshaping."""
    queue, seen = neighbours(start)[:], {start}
    while queue:
        node = queue.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if target_name(node) in _PRODUCTS and not any(map(_is_parameter, node.all_input_nodes)):
            return node
        if target_name(node) in _KEEPS_PRODUCT:
            queue.extend(neighbours(node))
    return None


def _attention_by_class(region: Region, table: RegionTable, owners: Mapping[str, Operands]) -> bool:
    """Without a kernel call (linear attention): by the class name, unless a kernel's owner lies inside or around."""
    if not _ATTENTION_CLASS.search(region.class_name) or _linears(table.nodes[region.id]) < 2:
        return False
    return not any(table.inside(o, region.id) or table.inside(region.id, o) for o in owners)


def _is_parameter(node: fx.Node) -> bool:
    """A placeholder that is a parameter or a buffer."""
    source = _torch.placeholder_source(node) if node.op == "placeholder" else None
    return source is not None and ("_parameters[" in source or "_buffers[" in source)


def _uses_parameters(nodes: list[fx.Node]) -> bool:
    return any(_is_parameter(operand) for node in nodes for operand in node.all_input_nodes)


def _linears(nodes: list[fx.Node]) -> int:
    return sum(
        n.op == "call_function" and (n.target in _LINEAR or "conv" in str(getattr(n.target, "__name__", "")))
        for n in nodes
    )


def _is_cross(query: fx.Node, key: fx.Node, members: set[fx.Node], *, only_projected: bool) -> bool:
    roots_of_query, roots_of_key = (_projected_from(value, members, only_projected) for value in (query, key))
    return bool(roots_of_query) and bool(roots_of_key) and not roots_of_query & roots_of_key


def _projected_from(value: fx.Node, members: set[fx.Node], only_projected: bool) -> set[fx.Node]:
    """The activations outside the region that reach ``value`` through a projection.

    Rotary tables and masks meet a value after its projection, so they are not among its roots; without any
    projection on the way, every activation that reaches the value counts (``only_projected``: none does).
    """
    projected: set[fx.Node] = set()
    direct: set[fx.Node] = set()
    seen: set[tuple[fx.Node, bool]] = set()
    stack = [(value, False)]
    while stack:
        node, behind = stack.pop()
        if (node, behind) in seen:
            continue
        seen.add((node, behind))
        if node not in members:
            if not _is_parameter(node) and isinstance(node.meta.get("example_value"), torch.Tensor):
                (projected if behind else direct).add(node)
            continue
        linear = node.op == "call_function" and node.target in _LINEAR and any(map(_is_parameter, node.all_input_nodes))
        stack.extend((operand, behind or linear) for operand in node.all_input_nodes)
    return projected if only_projected else projected or direct
