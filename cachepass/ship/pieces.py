"""Pieces: a variant's graph, with calls of what repeats, as graphs that AOTInductor can compile, and their order.

    cut_up : GraphModule with invoke_subgraph -> Listing, a graph for each program

        a = embed(x)                               call  head   x -> a
        b = invoke_subgraph(block, a, w0)[0]       call  block  a w0 -> b
        c = invoke_subgraph(block, b, w1)[0]  ->   call  block  b w1 -> c
        copy_(slot, c)                             copy  c -> slot
        d = norm(c)                                call  tail   c -> d

AOTInductor has no calls inside of a program, so the graph is cut at them. What stands between two calls is a program
of its own, unless it is no work: a view is made by whoever runs the listing, and a slot is copied to. Each value has
the strides that it has in the graph, on both sides of a cut.
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .. import _torch
from ..capture.nodes import copied, nodes_in, operand, operands, returned_by
from ..errors import ExportError
from ..program.emit import alias_root, aten
from .listing import Call, Copy, Listing, View
from .manifest import lie_alike

_CONVERSIONS = (torch.ops.prims.convert_element_type.default, aten._to_copy.default)


@dataclass(frozen=True, eq=False)
class Piece:
    """A graph of a program; its placeholders are the values ``reads`` of the graph that it was cut out of."""

    gm: fx.GraphModule
    reads: tuple[fx.Node, ...]
    gives: tuple[fx.Node, ...]


@dataclass
class Pieces:
    """The programs of all variants of a model: graphs that are the same are one.

    Attributes:
        graphs: By name.
    """

    graphs: dict[str, fx.GraphModule] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)

    def name_of(self, gm: fx.GraphModule, wanted: str) -> str:
        """The name of a graph's program: the one that a graph like it has, or a new one."""
        key, wanted = _fingerprint(gm), re.sub(r"[^\w.]+", "-", wanted)
        if key not in self._names:
            count = sum(name == wanted or name.startswith(f"{wanted}.") for name in self.graphs)
            name = f"{wanted}.{count + 1}" if count else wanted
            self._names[key] = name
            self.graphs[name] = gm
        return self._names[key]


def cut_up(
    gm: fx.GraphModule,
    name: str,
    pieces: Pieces,
    *,
    read: Sequence[int] | None = None,
    inputs: int,
    adopting: Sequence[int] = (),
) -> Listing:
    """The listing of a variant, whose programs are added to ``pieces``.

    Args:
        gm: Its graph, as Inductor would be given it.
        name: Of the variant.
        pieces: The programs that are known.
        read: Which of the variant's inputs the graph has; None: all.
        inputs: Number of them.
        adopting: Inputs that take over the last results.

    Raises:
        ExportError: Sizes depend on data.
    """
    _require_fixed(gm.graph, name)
    gm = _settled(gm)
    placeholders = gm.graph.find_nodes(op="placeholder")
    numbers = range(inputs) if read is None else read
    writer = _Writer(name, pieces, inputs, dict(zip(placeholders, numbers, strict=True)), _early_copies(gm.graph))
    for group in _groups(gm.graph):
        writer.write_group(gm, group, _needed(gm.graph, group, writer.early))
    results = tuple(writer.number(node) for node in returned_by(gm.graph))
    return Listing(name, inputs, tuple(writer.steps), results, tuple(adopting))


def _require_fixed(graph: fx.Graph, name: str) -> None:
    for node in graph.nodes:
        value = node.meta.get("val")
        numbers = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
        if any(isinstance(n, (torch.SymInt, torch.SymFloat, torch.SymBool)) for n in numbers):
            raise ExportError(
                f"sizes are not known before it runs ({node.name})",
                where=f"export, program {name}",
                hint="a model whose sizes depend on data, or were given as symbols, cannot be exported",
            )


def _settled(gm: fx.GraphModule, inputs: Sequence[Any] = ()) -> fx.GraphModule:
    """The graph with what its values truly are: passes may have put a value of other strides in front of the views of
    one. A body that is called with values of other strides than it was made for is one of its own for this call.
    ``inputs``: its placeholders' values, where they are others."""
    graph = copied(gm.graph)
    for node, value in zip(graph.find_nodes(op="placeholder"), inputs, strict=False):
        node.meta["val"] = value
    fake_mode = _torch.fake_mode_of([node.meta.get("val") for node in graph.find_nodes(op="placeholder")])
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _torch.INVOKE_SUBGRAPH:
            _fit(gm, node)
        elif node.target is operator.getitem:
            node.meta["val"] = operand(node).meta["val"][node.args[1]]
        elif isinstance(node.target, torch._ops.OpOverload):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])  # pyright: ignore
            with fake_mode, torch.no_grad():
                node.meta["val"] = node.target(*args, **kwargs)
    return _torch.graph_module(gm, graph)


def _fit(gm: fx.GraphModule, call: fx.Node) -> None:
    """Let a call have a body that is made for its operands."""
    body, name, *given = call.args
    assert isinstance(body, fx.Node) and isinstance(body.target, str)
    known: Any = gm.get_submodule(body.target)
    values = [value.meta["val"] for value in nodes_in(given)]
    expected = [node.meta["val"] for node in known.graph.find_nodes(op="placeholder")]
    if all(map(_lie_alike, values, expected)):
        return
    own, fitting = f"{body.target}_{call.name}", _settled(known, values)
    gm.add_submodule(own, fitting)
    with call.graph.inserting_before(call):
        call.args = (call.graph.get_attr(own), name, *given)
    call.meta["val"] = tuple(node.meta["val"] for node in returned_by(fitting.graph))


def _lie_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return lie_alike(one.stride(), other.stride(), one.shape)


def _groups(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The graph's operations in their order: a call alone, or all that stands between two."""
    group: list[fx.Node] = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is _torch.INVOKE_SUBGRAPH:
            yield group
            yield [node]
            group = []
        else:
            group.append(node)
    yield group


def _is_view(node: fx.Node) -> bool:
    """It is a part of the memory of something else, of the same dtype: nothing is computed."""
    value, root = node.meta.get("val"), alias_root(node)
    known = root.meta.get("val")
    if root is node:
        return False
    return not isinstance(value, torch.Tensor) or (isinstance(known, torch.Tensor) and known.dtype == value.dtype)


@dataclass(frozen=True)
class _Early:
    """Copies of what a call gave into slots that nothing else touches: they are made right behind the call, so that
    its memory is free again.

    Attributes:
        copies: For each value that is copied, the slots; what is copied has another dtype, or is a view of it.
        gone: Nodes that are not computed: the copies, and conversions for them alone.
    """

    copies: dict[fx.Node, list[tuple[fx.Node, fx.Node]]]
    gone: set[fx.Node]


def _early_copies(graph: fx.Graph) -> _Early:
    early = _Early({}, set())
    for node in graph.find_nodes(op="call_function", target=aten.copy_.default):
        slot, value = operand(node), operand(node, 1)
        conversions = []
        while value.target in _CONVERSIONS and len(value.users) == 1:
            conversions.append(value)
            value = operand(value)
        if slot.op == "placeholder" and len(slot.users) == 1 and not node.users and _is_item_of_call(_owner(value)):
            early.copies.setdefault(operand(_owner(value)), []).append((value, slot))
            early.gone.update((node, *conversions))
    return early


def _needed(graph: fx.Graph, group: Sequence[fx.Node], early: _Early) -> set[fx.Node]:
    """Tensors of a group that own their memory and are read behind it, by themselves or through views."""
    inside = set(group)
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node not in inside and node.op in ("call_function", "output") and node not in early.gone:
            found.update(_owner(value) for value in operands(node))
    return found & inside


def _owner(node: fx.Node) -> fx.Node:
    return alias_root(node) if _is_view(node) else node


@dataclass
class _Writer:
    """Writes the listing of one variant."""

    name: str
    pieces: Pieces
    count: int
    numbers: dict[fx.Node, int]
    early: _Early
    steps: list[Call | View | Copy] = field(default_factory=list)

    def number(self, node: fx.Node) -> int:
        """The number of a value; a view is made where it is first asked for."""
        if node not in self.numbers:
            assert _is_view(node), f"{node} is computed before it is read"
            root = alias_root(node)
            source, value, whole = self.number(root), node.meta["val"], root.meta["val"]
            offset = int(value.storage_offset() - whole.storage_offset())
            result = self._new(node)
            self.steps.append(View(source, result, tuple(value.shape), tuple(value.stride()), offset))
        return self.numbers[node]

    def _new(self, node: fx.Node) -> int:
        self.numbers[node] = self.count
        self.count += 1
        return self.numbers[node]

    def write_group(self, gm: fx.GraphModule, group: list[fx.Node], needed: set[fx.Node]) -> None:
        if group and group[0].target is _torch.INVOKE_SUBGRAPH:
            self._write_call(gm, group[0])
            return
        left_out = self.early.gone
        work = [n for n in group if not _is_view(n) and not _is_item_of_call(n) and n not in left_out]
        inside = {node for node in work if node.target is not aten.copy_.default}
        copies = [node for node in work if node not in inside and _owner(operand(node, 1)) not in inside]
        work = [node for node in work if node not in copies]
        if work:
            piece = _piece(gm, work, [node for node in group if node in needed and node in inside])
            self._write_piece(piece, self.name)
        for node in copies:
            self.steps.append(Copy(self.number(operand(node, 1)), self.number(operand(node))))

    def _write_piece(self, piece: Piece, wanted: str) -> None:
        inputs = tuple(self.number(node) for node in piece.reads)
        program = self.pieces.name_of(piece.gm, wanted)
        self.steps.append(Call(program, inputs, tuple(self._new(node) for node in piece.gives)))

    def _write_call(self, gm: fx.GraphModule, node: fx.Node) -> None:
        body, _, *given = node.args
        assert isinstance(body, fx.Node) and isinstance(body.target, str)
        program = self.pieces.name_of(gm.get_submodule(body.target), f"{self.name}.block")  # pyright: ignore
        inputs = tuple(self.number(value) for value in nodes_in(given))
        items = {user.args[1]: user for user in node.users}
        outputs = []
        for i in range(len(node.meta["val"])):
            outputs.append(self._new(items[i]) if i in items else self._skip())
        self.steps.append(Call(program, inputs, tuple(outputs)))
        for value, slot in self.early.copies.get(node, ()):
            self.steps.append(Copy(self.number(value), self.number(slot)))

    def _skip(self) -> int:
        """A number for a value that nobody reads."""
        self.count += 1
        return self.count - 1


def _is_item_of_call(node: fx.Node) -> bool:
    return node.target is operator.getitem and operand(node).target is _torch.INVOKE_SUBGRAPH


def _piece(gm: fx.GraphModule, work: Sequence[fx.Node], gives: Sequence[fx.Node]) -> Piece:
    """The graph of some operations; views of what it reads are made in it again, where they cost nothing."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    reads: dict[fx.Node, fx.Node] = {}
    inside = set(work)

    def take(node: fx.Node) -> fx.Node:
        if node in env:
            return env[node]
        if node.op == "get_attr" or (_is_view(node) and node.op == "call_function"):
            env[node] = graph.node_copy(node, take)
        else:
            assert node not in inside, "operations stand in the order in which they need each other"
            env[node] = reads[node] = read(node)
        return env[node]

    def read(node: fx.Node) -> fx.Node:
        first = next(iter(graph.nodes), None)
        with graph.inserting_before(first) if first is not None else graph.inserting_after():
            made = graph.placeholder(f"value_{len(reads)}")
        made.meta["val"] = node.meta["val"]
        return made

    for node in work:
        env[node] = graph.node_copy(node, take)
    graph.output(tuple(env[node] for node in gives))
    graph.lint()
    order = {made: node for node, made in reads.items()}
    given = tuple(order[made] for made in graph.find_nodes(op="placeholder"))
    return Piece(_torch.graph_module(gm, graph), given, tuple(gives))


def _fingerprint(gm: fx.GraphModule) -> str:
    """Equal for graphs that compute the same in the same way."""
    numbers = {node: i for i, node in enumerate(gm.graph.nodes)}
    lines = []
    for node in gm.graph.nodes:
        args = fx.map_arg((node.args, node.kwargs), lambda source: f"%{numbers[source]}")  # pyright: ignore
        target = node.target if node.op in ("call_function",) else ""
        if node.op == "get_attr":
            target = str(id(getattr(gm, str(node.target))))
        lines.append(f"{node.op} {target} {args} {_form(node.meta.get('val'))}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _form(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.stride()} {value.dtype} {value.device}"
    return ", ".join(map(_form, value)) if isinstance(value, (tuple, list)) else ""
