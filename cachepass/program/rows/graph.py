"""Over rows: the program of one request becomes one of several, each at a step of its own.

    over_rows : graph of a variant, which of its inputs differ from row to row, R -> graph for R rows

        h0, w, next: slots and weights                    p = index(pool, [pages[0]])              # [R, *slot]
        y = select(w, 0, 0) * h0                  ->      y = view(select(w, 1, 0), [R, 1, 1]) * p
        copy_(next, v)                                    index_put_(pool, [pages[1]], v)
        return y                                          return y                                 # [R, *y]

Every value that depends on something which differs has rows in front; parameters, and what depends on nothing else,
stay as they are. What requests keep lies in *pools*, one tensor for all of them: of each row the program is told its
pages. Pages are read where the program begins and written where it ends, and no page is of two rows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from ... import _torch
from ...capture.nodes import returned_by
from ..emit import CONVERT, Emitter, aten
from ..liveness import is_impure
from ..plan import CachePlan
from ..roles import Carried, Distance, History, Invariant, Next, Output, Parameters, ProbeSlot, Role, Weights
from ..slots import dense_strides
from ..specialize import Variant
from .pools import NEXT, Page, PoolKey, pool_strides
from .rules import RowsEmitter, on_rows
from .variant import RowGraph


def over_rows(
    variant: Variant,
    own: Sequence[Any],
    differ: Collection[int],
    rows: int,
    plan: CachePlan,
    seats: int,
    shared: Collection[str] = (),
) -> RowGraph:
    """The graph of a variant for so many rows.

    Args:
        variant: Of one request.
        own: The model's own inputs, as AOTAutograd gave them: (fake) tensors and numbers.
        differ: Indices of those that differ from row to row.
        rows: How many there are.
        plan: What is kept.
        seats: How many requests the pools have room for.
        shared: What is kept for a run and is the same for all requests, by name.

    Raises:
        NotImplementedError: An operation cannot be done on rows; the message says which.
    """
    return _Writer(variant, own, frozenset(differ), rows, plan, seats, frozenset(shared)).write()


class _Writer:
    def __init__(
        self,
        variant: Variant,
        own: Sequence[Any],
        differ: frozenset[int],
        rows: int,
        plan: CachePlan,
        seats: int,
        shared: frozenset[str],
    ) -> None:
        self.variant, self.own, self.differ, self.rows, self.plan, self.seats = variant, own, differ, rows, plan, seats
        self.shared = shared
        self.source = variant.gm.graph
        self.graph = fx.Graph()
        placeholders = self.source.find_nodes(op="placeholder")
        self.emit = Emitter(self.graph, _torch.fake_mode_of([node.meta.get("val") for node in placeholders]))
        self.over = RowsEmitter(self.emit, rows)
        self.env: dict[fx.Node, Any] = {}
        self.pools: dict[PoolKey, fx.Node] = {}
        self.pages: dict[Page, fx.Node] = {}
        self.page_of: dict[fx.Node, tuple[PoolKey, Page]] = {}
        self.written: dict[fx.Node, fx.Node] = {}
        self.roles = dict(zip(placeholders[len(own) :], variant.inputs, strict=True))

    def write(self) -> RowGraph:
        shared, scalars, carried = self._inputs()
        slots = list(self.page_of)
        keys = tuple(dict.fromkeys(page for _, page in self.page_of.values()))
        if keys:
            with self.emit.fake_mode:
                numbers = torch.empty((len(keys), self.rows), dtype=torch.int64, device=self._device())
            pages = self.emit.placeholder("pages", numbers)
            self.pages = {page: self.emit(aten.select.int, pages, 0, i) for i, page in enumerate(keys)}
        for slot in slots:
            pool, page = self.page_of[slot]
            if _is_read(slot):
                self.env[slot] = self.over(aten.index.Tensor, self.pools[pool], [self.pages[page]])
        for node in self.source.nodes:
            if node.op not in ("placeholder", "output"):
                self._node(node)
        for slot, value in self.written.items():
            pool, page = self.page_of[slot]
            self.emit(aten.index_put_.default, self.pools[pool], [self.pages[page]], value)
        results = [self._result(value, role) for value, role in self._results()]
        self.graph.output(tuple(results))
        self.graph.eliminate_dead_code(is_impure_node=is_impure)
        self.graph.lint()
        inputs = tuple(node.meta["val"] for node in self.graph.find_nodes(op="placeholder"))
        led = tuple(value in self.over.led for value in results)
        gm = _torch.graph_module(self.variant.gm, self.graph)
        return RowGraph(gm, inputs, shared, scalars, carried, tuple(self.pools), keys, led)

    # ---- inputs -----------------------------------------------------------------------------------------------------

    def _inputs(self) -> tuple[tuple[str, ...], tuple[Weights | Parameters, ...], tuple[Carried, ...]]:
        """Placeholders for everything but the pages; what they are."""
        placeholders = self.source.find_nodes(op="placeholder")
        for i, node in enumerate(placeholders[: len(self.own)]):
            value = node.meta.get("val", self.own[i])
            self.env[node] = self._placeholder(node, value, led=i in self.differ)
        invariants = [(n, role) for n, role in self.roles.items() if isinstance(role, Invariant)]
        shared = [(node, role) for node, role in invariants if role.name in self.shared]
        for node, _ in shared:
            self.env[node] = self._placeholder(node, node.meta["val"], led=False)
        scalars = [(n, role) for n, role in self.roles.items() if isinstance(role, (Weights, Parameters))]
        carried = [(n, role) for n, role in self.roles.items() if isinstance(role, Carried)]
        for node, _ in (*scalars, *carried):
            self.env[node] = self._placeholder(node, node.meta["val"], led=True)
        for node, role in self.roles.items():
            if node in self.env:
                continue
            pool, page = self._place(role)
            self.page_of[node] = pool, page
            if pool not in self.pools:
                self.pools[pool] = self._pool(page, node)
        names = tuple(role.name for _, role in shared)
        return names, tuple(role for _, role in scalars), tuple(role for _, role in carried)

    def _placeholder(self, node: fx.Node, value: Any, *, led: bool) -> fx.Node:
        if not led or not isinstance(value, torch.Tensor):
            return self.emit.placeholder(node.name, value)
        shape, stride = tuple(value.shape), dense_strides(value)
        with self.emit.fake_mode:
            many = torch.empty_strided(
                (self.rows, *shape), pool_strides(shape, stride), dtype=value.dtype, device=value.device
            )
        placeholder = self.emit.placeholder(node.name, many)
        self.over.led.add(placeholder)
        return placeholder

    def _place(self, role: Role) -> tuple[PoolKey, Page]:
        if isinstance(role, (History, Next)):
            age = role.age if isinstance(role, History) else NEXT
            return PoolKey("cut", role.cut), Page(self.plan.cuts[role.cut].history, role.group, age)
        if isinstance(role, Output):
            return PoolKey("output", role.name), Page(output=role.name)
        if isinstance(role, Invariant):
            return PoolKey("invariant", role.name), Page()
        if isinstance(role, ProbeSlot):
            return PoolKey("probe"), Page()
        raise NotImplementedError(f"programs that take {type(role).__name__}")

    def _pool(self, page: Page, node: fx.Node) -> fx.Node:
        value: torch.Tensor = node.meta["val"]
        shape, stride = tuple(value.shape), tuple(value.stride())
        with self.emit.fake_mode:
            many = torch.empty_strided(
                (self.seats * page.ring, *shape), pool_strides(shape, stride), dtype=value.dtype, device=value.device
            )
        return self.emit.placeholder(f"pool_{node.name}", many)

    def _device(self) -> torch.device:
        return next(iter(self.pools.values())).meta["val"].device

    # ---- operations -------------------------------------------------------------------------------------------------

    def _node(self, node: fx.Node) -> None:
        known: Callable[[fx.Node], Any] = self.env.__getitem__
        if node.op == "call_function" and node.target is aten.copy_.default:
            self._write(node)
        elif node.op == "call_function" and node.target is operator.getitem and self._is_parts(node):
            self.env[node] = self.env[node.args[0]][node.args[1]]  # pyright: ignore
        elif not any(map(self._is_led, node.all_input_nodes)):
            self.env[node] = self.graph.node_copy(node, known)
        elif node.target is operator.getitem:
            self.env[node] = self.over(operator.getitem, self.env[node.args[0]], node.args[1])  # pyright: ignore
        elif is_impure(node) or not isinstance(node.target, torch._ops.OpOverload) or _depends_on_data(node):
            raise NotImplementedError(str(node.target))
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), known)  # pyright: ignore
            with self.emit.of(node):
                self.env[node] = on_rows(self.over, node.target, args, kwargs)

    def _is_parts(self, node: fx.Node) -> bool:
        return isinstance(self.env[node.args[0]], tuple)  # pyright: ignore

    def _is_led(self, node: fx.Node) -> bool:
        value = self.env.get(node)
        return any(map(self.over.is_led, value if isinstance(value, tuple) else (value,)))

    def _write(self, node: fx.Node) -> None:
        """A slot's value: it is written where the program ends, and read as it is until then."""
        slot, value = node.args[:2]
        assert isinstance(slot, fx.Node) and isinstance(value, fx.Node)
        if slot not in self.page_of:
            if self._is_led(value) or self._is_led(slot):
                raise NotImplementedError(f"it writes to its input {slot.name}")
            self.env[node] = self.graph.node_copy(node, self.env.__getitem__)
            return
        kept = self.over.lead(self.env[value])
        if kept.meta["val"].dtype != slot.meta["val"].dtype:
            kept = self.over(CONVERT, kept, slot.meta["val"].dtype)
        self.written[slot] = self.env[slot] = self.env[node] = kept

    # ---- results ----------------------------------------------------------------------------------------------------

    def _results(self) -> list[tuple[Any, Role | None]]:
        returned = returned_by(self.source)
        own = len(returned) - len(self.variant.kept)
        return [(value, None if i < own else self.variant.kept[i - own]) for i, value in enumerate(returned)]

    def _result(self, value: Any, role: Role | None) -> Any:
        result = self.env[value] if isinstance(value, fx.Node) else value
        if not isinstance(role, (Carried, Distance)):
            return result
        result = self.over.lead(result)
        like: torch.Tensor = result.meta["val"]
        _, *stride = like.stride() if isinstance(role, Distance) else (0, *dense_strides(value.meta["val"]))
        wanted = pool_strides(tuple(like.shape)[1:], stride)
        held = self.emit.held(self.emit(aten.clone.default, result) if like.stride() != wanted else result, wanted)
        self.over.led.add(held)
        return held


def _is_read(slot: fx.Node) -> bool:
    """Something but a write takes the slot."""
    return any(not (user.target is aten.copy_.default and user.args[0] is slot) for user in slot.users) or any(
        user.target is aten.copy_.default and user.args[1] is slot for user in slot.users
    )


def _depends_on_data(node: fx.Node) -> bool:
    values = node.meta.get("val")
    return any(map(_torch.depends_on_data, values if isinstance(values, (tuple, list)) else (values,)))
