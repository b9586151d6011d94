"""Regions: the module calls of a Dynamo graph, and what each one is.

    find_regions : Dynamo GraphModule -> RegionTable

Every node carries its ``nn_module_stack``: one entry per module call that it was traced in. A region is all nodes of
one entry; its outputs are its floating-point tensors that are used outside. What a region *is* comes from what it
does: an attention is the module that owns a scaled-dot-product-attention call, and it is a cross-attention if the
activations that its keys are projected from and those that its queries are projected from have nothing in common.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from .. import _torch
from ..methods import Region, Skip

_TOKEN = re.compile(r"\['([^']*)'\]|\[(\d+)\]|\.([A-Za-z_0-9]+)")
_PLUMBING = {"__dict__", "_modules", "_parameters", "_buffers", "_orig_mod"}
_ATTENTION_CLASS = re.compile(r"(Attention|Attn)(\d*D?)$")
_MLP_CLASS = re.compile(r"(feed_?forward|mlp|ffn)", re.IGNORECASE)
_MLP_NAME = re.compile(r"(ff|ffn|mlp|feed_?forward)(_\w+)?$", re.IGNORECASE)
_LINEAR = {torch.nn.functional.linear, torch.matmul, torch.bmm, torch.addmm, torch.mm}
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}


def dotted(source: str) -> str:
    """``L['self'].__dict__['_modules']['blocks'].0.attn`` -> ``blocks.0.attn``: a path below the compiled module."""
    match = re.match(r"[LG]\['[^']*'\]", source)
    tokens = ["".join(t) for t in _TOKEN.findall(source[match.end() :] if match else "." + source)]
    if "cell_contents" in tokens:
        tokens = tokens[tokens.index("cell_contents") + 1 :]
    return ".".join(t for t in tokens if t not in _PLUMBING)


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


def find_regions(gm: fx.GraphModule, paths: Mapping[int, str] | None = None,
                 root: tuple[str, str] | None = None) -> RegionTable:  # fmt: skip
    """All module calls of a Dynamo graph; those that cannot be cut are in ``skips`` with the reason.

    Modules are named by where the captured code finds them. Where that is only a part of the model, ``paths`` names its
    modules, by their ids, and ``root`` (path, class name) is the module whose call is the whole graph, if there is one.
    """
    table, by_key = RegionTable(), {}
    calls: dict[str, int] = {}
    for node in gm.graph.nodes:
        for key, (path, cls) in _stack(node, root):
            if key not in by_key:
                name = (paths or {}).get(_torch.module_of(key)) or dotted(path)
                calls[name] = calls.get(name, -1) + 1
                region_id = name if calls[name] == 0 else f"{name}@{calls[name]}"
                by_key[key] = Region(region_id, name, _class_name(cls))
                table.nodes[region_id] = []
            table.nodes[by_key[key].id].append(node)
    table.regions = list(by_key.values())
    _find_outputs(table, gm)
    _classify(table, by_key)
    aliases = _Aliases(gm)
    for region in list(table.regions):
        reason = _unfit(region, table, aliases)
        if reason is not None:
            table.regions.remove(region)
            table.skips.append(Skip(region.id, reason))
    return table


def _stack(node: fx.Node, root: tuple[str, str] | None = None) -> Iterator[tuple[str, tuple[str, object]]]:
    if node.op in ("placeholder", "output"):
        return
    if root is not None:
        yield "root", (f"L['self'].{root[0]}", root[1])
    for key, (path, cls) in (node.meta.get("nn_module_stack") or {}).items():
        if dotted(path):
            yield str(key), (path, cls)


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
            if _is_floating(n.meta.get("example_value")) and any(u not in members for u in n.users)
        ]  # fmt: skip


def _is_floating(value: object) -> bool:
    """What can be forecast: integers, masks and sizes that leave a region are always computed."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _unfit(region: Region, table: RegionTable, aliases: _Aliases) -> str | None:
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
    return None


class _Aliases:
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
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = node.op == "call_method" and name.endswith("_") and not name.endswith("__")
    in_place |= node.op == "call_function" and (
        node.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    )
    out = node.kwargs.get("out")
    target = out if isinstance(out, fx.Node) else node.args[0] if in_place and node.args else None
    return target if isinstance(target, fx.Node) else None


# ---- what a region is -----------------------------------------------------------------------------------------------


def _classify(table: RegionTable, by_key: dict[str, Region]) -> None:
    kinds: dict[str, Region] = {}
    for region in table.regions:
        leaf = region.path.rsplit(".", 1)[-1]
        named = _MLP_CLASS.search(region.class_name) or _MLP_NAME.match(leaf)
        if named and _linears(table.nodes[region.id]) >= 2:
            kinds[region.id] = replace(region, is_mlp=True)
    mlps = list(kinds)
    owners = _attention_owners(table, by_key)
    for region in table.regions:
        kernel = owners.get(region.id)
        if kernel is None and not _attention_by_class(region, table, owners):
            continue
        # A block that calls the kernel itself, beside its feed-forward, is no attention: more would be skipped.
        if any(m != region.id and table.inside(m, region.id) for m in mlps):
            continue
        cross = kernel is not None and _is_cross(kernel, set(table.nodes[region.id]))
        kinds[region.id] = replace(region, is_attention=True, is_cross=cross, is_mlp=False)
    # A feed-forward inside an attention (or another feed-forward) belongs to it.
    marked = [r for r in kinds.values() if r.is_attention or r.is_mlp]
    for region in marked:
        if region.is_mlp and any(o.id != region.id and table.inside(region.id, o.id) for o in marked):
            kinds[region.id] = replace(region, is_mlp=False)
    table.regions = [kinds.get(r.id, r) for r in table.regions]


def _attention_owners(table: RegionTable, by_key: dict[str, Region]) -> dict[str, fx.Node]:
    """Regions that own an attention kernel: the innermost module around it that has parameters of its own."""
    owners: dict[str, fx.Node] = {}
    for node in _all_nodes(table):
        if not is_attention_kernel(node):
            continue
        chain = [by_key[key].id for key, _ in _stack(node)]
        while len(chain) > 1 and not _uses_parameters(table.nodes[chain[-1]]):
            chain.pop()
        if chain:
            owners.setdefault(chain[-1], node)
    return owners


def is_attention_kernel(node: fx.Node) -> bool:
    """A call of scaled_dot_product_attention or flex_attention."""
    name = str(getattr(node.target, "__name__", node.target))
    return node.op == "call_function" and ("scaled_dot_product_attention" in name or name == "flex_attention")


def _attention_by_class(region: Region, table: RegionTable, owners: dict[str, fx.Node]) -> bool:
    """Without a kernel call (linear attention): by the class name, unless a kernel's owner lies inside or around."""
    if not _ATTENTION_CLASS.search(region.class_name) or _linears(table.nodes[region.id]) < 2:
        return False
    return not any(table.inside(o, region.id) or table.inside(region.id, o) for o in owners)


def _all_nodes(table: RegionTable) -> list[fx.Node]:
    seen: dict[fx.Node, None] = {}
    for nodes in table.nodes.values():
        seen.update(dict.fromkeys(nodes))
    return list(seen)


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


def _is_cross(kernel: fx.Node, members: set[fx.Node]) -> bool:
    operands = [a for a in (*kernel.args, *kernel.kwargs.values()) if isinstance(a, fx.Node)]
    query = kernel.kwargs.get("query", operands[0])
    key = kernel.kwargs.get("key", operands[1])
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node)
    roots_of_query, roots_of_key = _projected_from(query, members), _projected_from(key, members)
    return bool(roots_of_query) and bool(roots_of_key) and not roots_of_query & roots_of_key


def _projected_from(value: fx.Node, members: set[fx.Node]) -> set[fx.Node]:
    """The activations outside the region that reach ``value`` through a projection.

    Rotary tables and masks meet a value after its projection, so they are not among its roots; without any
    projection on the way, every activation that reaches the value counts.
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
    return projected or direct
