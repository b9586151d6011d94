"""The plan: every cut, slot and phase of a traced graph, known to the byte before anything runs.

    make_plan : ATen GraphModule with cut markers, targets -> CachePlan

A slot is kept only if some phase reads it: liveness walks back from the graph's outputs once per phase, stopping at
the cuts that the phase predicts. A cut whose forecast no phase reads is dead; so are its slots.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..forecast import Forecast
from ..frequency import Latents, wide_dtype
from ..methods import WHOLE, Guidance, Route, Skip, Target
from .annotate import CUT, OUTPUT


@dataclass(frozen=True)
class Phase:
    """What a call does: the groups that are predicted, in the plan's order, and its route through the model."""

    predicted: tuple[str, ...] = ()
    route: Route = WHOLE


@dataclass(frozen=True)
class Cut:
    """One value that may be replaced by a forecast.

    Attributes:
        index: Position among the plan's cuts.
        region, output: The region's id and which of its outputs.
        group, forecast: Its schedule, and what stands in for it.
        shape, stride, dtype, device: Of the value. Sizes may be symbolic.
        slot_dtype: Dtype in which its history is kept.
        live: Some phase reads its forecast; if not, it has no slots.
        row: Which region of its group it belongs to: where weights differ by region, its row of them.
    """

    index: int
    region: str
    output: int
    group: str
    forecast: Forecast
    shape: tuple[int | torch.SymInt, ...]
    stride: tuple[int | torch.SymInt, ...]
    dtype: torch.dtype
    device: torch.device
    slot_dtype: torch.dtype
    live: bool = True
    row: int = 0

    @property
    def name(self) -> str:
        return f"{self.region}:{self.output}"

    @property
    def history(self) -> int:
        """Outputs kept: the slots of its ring."""
        return self.forecast.history if self.live else 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot; 0 while a size is symbolic."""
        return _bytes(self.shape, self.slot_dtype)


def _bytes(shape: Sequence[int | torch.SymInt], dtype: torch.dtype) -> int:
    known = [size for size in shape if isinstance(size, int)]
    return math.prod(known) * dtype.itemsize if len(known) == len(shape) else 0


@dataclass(frozen=True)
class NamedSlot:
    """What is kept of one value, for guidance or for a whole run: shape and dtype as of a :class:`Cut`'s slot."""

    name: str
    shape: tuple[int | torch.SymInt, ...]
    stride: tuple[int | torch.SymInt, ...]
    slot_dtype: torch.dtype
    device: torch.device

    @property
    def slot_bytes(self) -> int:
        return _bytes(self.shape, self.slot_dtype)


@dataclass(frozen=True)
class OutputPlan:
    """What is done with the model's output.

    Attributes:
        guidance: The method's part: schedule, routes, slots.
        latents: How the output carries its samples.
        slots: What is kept.
        halved: A call brings [uncond, cond] batches; if not, the two come as two calls.
    """

    guidance: Guidance
    latents: Latents
    slots: tuple[NamedSlot, ...]
    halved: bool

    @property
    def slot_bytes(self) -> int:
        return sum(slot.slot_bytes for slot in self.slots)

    @property
    def routes(self) -> tuple[Route, ...]:
        guidance = self.guidance
        return (guidance.both, guidance.half) if self.halved else (guidance.cond, guidance.uncond, guidance.answer)


class Layout:
    """Equal for plans that keep the same: graphs of one model that were captured under different conditions go on with
    each other's history. It is looked up on every call, so its hash is computed once."""

    __slots__ = ("_hash", "parts")

    def __init__(self, parts: tuple[object, ...]) -> None:
        self.parts, self._hash = parts, hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Layout) and self.parts == other.parts)


@dataclass(frozen=True)
class _GroupPlan:
    """What :class:`CachePlan` says about one group."""

    history: int
    weighted: bool
    recursive: bool
    weight_regions: tuple[str, ...]


def _group_plan(cuts: Sequence[Cut]) -> _GroupPlan:
    live = [cut for cut in cuts if cut.live]
    paths = tuple(dict.fromkeys(cut.region.split("@")[0] for cut in cuts))
    return _GroupPlan(
        history=max(cut.history for cut in cuts),
        weighted=any(cut.forecast.constant_weights is None for cut in live),
        recursive=any(cut.forecast.recursive for cut in live),
        weight_regions=paths if any(cut.forecast.per_region for cut in cuts) else ("",),
    )


@dataclass(frozen=True)
class CachePlan:
    """What will be kept and which programs there will be.

    Attributes:
        cuts: All cuts in graph order.
        groups: Groups with at least one live cut.
        phases: Every combination of predicted groups, the all-computed one first.
        returns: Programs with conditionals return what is to be kept, and write no slot (the cond lowering).
        skips: Regions that are not cut, with the reason.
        notes: Remarks of the method.
        output: What is done with the model's output, if anything.
    """

    cuts: tuple[Cut, ...]
    groups: tuple[str, ...]
    phases: tuple[Phase, ...]
    returns: bool
    skips: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()
    output: OutputPlan | None = None

    @property
    def live_cuts(self) -> tuple[Cut, ...]:
        return tuple(cut for cut in self.cuts if cut.live)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all slots for one context of one model instance (for guidance by two calls: for the pair of their
        contexts); symbolic sizes count as 0."""
        return self.cut_bytes + (0 if self.output is None else self.output.slot_bytes)

    @property
    def cut_bytes(self) -> int:
        """Of these, the bytes of the cuts' slots."""
        return sum(cut.history * cut.slot_bytes for cut in self.cuts)

    def layout(self, resolve: Callable[[object], int], prefix: str = "") -> Layout:
        """What the plan keeps, once the symbolic sizes have values, below the module of the path ``prefix``."""
        return Layout((self.returns, *(
            (c.region.removeprefix(prefix), c.output, c.group, c.forecast, tuple(map(resolve, c.shape)),
             tuple(map(resolve, c.stride)), c.slot_dtype, c.device, c.live)
            for c in self.cuts
        )))  # fmt: skip

    @property
    def sizes(self) -> list[int | torch.SymInt]:
        """All sizes and strides of the live cuts."""
        return [size for cut in self.live_cuts for size in (*cut.shape, *cut.stride)]

    def history(self, group: str) -> int:
        """Outputs kept by the group's deepest ring."""
        return self._schedule[group].history if group in self._schedule else 0

    def weighted(self, group: str) -> bool:
        """Some live cut of the group takes weights at run time."""
        return group in self._schedule and self._schedule[group].weighted

    def recursive(self, group: str) -> bool:
        """Predictions of the group are kept as computed outputs are."""
        return group in self._schedule and self._schedule[group].recursive

    def weight_regions(self, group: str) -> tuple[str, ...]:
        """Paths of the regions whose weights differ, in order of their rows; one nameless one where none do."""
        return self._schedule[group].weight_regions if group in self._schedule else ("",)

    @functools.cached_property
    def _schedule(self) -> dict[str, _GroupPlan]:
        """Asked on every step, so no walk over the cuts may be behind it."""
        return {group: _group_plan([c for c in self.cuts if c.group == group])
                for group in dict.fromkeys(c.group for c in self.cuts)}  # fmt: skip

    @property
    def schedules(self) -> tuple[str, ...]:
        """Everything that is scheduled: the groups, and the guidance's."""
        return self.groups if self.output is None else (*self.groups, self.output.guidance.group)


def phase_name(phase: Phase, groups: Sequence[str]) -> str:
    """``"compute"``, ``"predict"``, or ``"predict:cross+spatial"`` where only some groups are predicted; behind the
    route's name (``"half/predict"``), if it has one."""
    names = [phase.route.name] if phase.route.name else []
    if phase.predicted:
        names.append("predict" if len(phase.predicted) == len(groups) else "predict:" + "+".join(phase.predicted))
    return "/".join(names) or "compute"


def make_plan(gm: fx.GraphModule, targets: Sequence[Target], *, returns: bool = False, skips: Iterable[Skip] = (),
              notes: Iterable[str] = (), guidance: Guidance | None = None, latents: Latents | None = None,
              halved: bool = False) -> CachePlan:  # fmt: skip
    """Plan the cuts whose markers stand in ``gm``; with ``halved`` that is the graph of the conditional half."""
    target_of = {target.region.id: target for target in targets}
    markers = cut_nodes(gm.graph)
    group_of = {node: target_of[str(node.args[1])].group for node in markers}
    groups = tuple(dict.fromkeys(group_of.values()))
    live = _live_markers(gm.graph, group_of, groups)
    rows: dict[str, list[str]] = {}
    cuts = []
    for i, node in enumerate(markers):
        target = target_of[str(node.args[1])]
        row = _row(rows.setdefault(target.group, []), target)
        cuts.append(_make_cut(i, node, target, node in live, row))
    groups = tuple(group for group in groups if any(cut.live and cut.group == group for cut in cuts))
    output = None
    if guidance is not None:
        output = _plan_output(gm, guidance, latents or guidance.latents, halved)
    routes = (WHOLE,) if output is None else output.routes
    phases = tuple(Phase(p, route) for route in routes for p in (_subsets(groups) if route.predicts else [()]))
    return CachePlan(tuple(cuts), groups, phases, returns, tuple(skips), tuple(notes), output)


def _row(rows: list[str], target: Target) -> int:
    """Calls of one module share their weights."""
    if not target.forecast.per_region:
        return 0
    if target.region.path not in rows:
        rows.append(target.region.path)
    return rows.index(target.region.path)


def _plan_output(gm: fx.GraphModule, guidance: Guidance, latents: Latents, halved: bool) -> OutputPlan:
    values: list[torch.Tensor] = [node.meta["val"] for node in output_nodes(gm.graph)]
    sample = values[0]
    shape = (len(values), *sample.shape) if latents.listed else tuple(sample.shape)
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    dtypes = {True: wide_dtype(sample.dtype), False: sample.dtype}
    routes = (guidance.both, guidance.half) if halved else (guidance.cond, guidance.uncond)
    written = {name for route in routes for name in route.writes}
    slots = [NamedSlot(name, shape, tuple(strides), dtypes[wide], sample.device)
             for name, wide in guidance.slots.items() if name in written]  # fmt: skip
    return OutputPlan(guidance, latents, tuple(slots), halved)


def cut_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The cut markers of an ATen graph, in order, without those of the model's output."""
    return [n for n in graph.find_nodes(op="call_function", target=CUT) if n.args[1] != OUTPUT]


def output_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The markers of the model's output."""
    return [n for n in graph.find_nodes(op="call_function", target=CUT) if n.args[1] == OUTPUT]


def _make_cut(index: int, node: fx.Node, target: Target, live: bool, row: int) -> Cut:
    value: torch.Tensor = node.meta["val"]
    region, output = node.args[1:]
    assert isinstance(region, str) and isinstance(output, int)
    return Cut(
        index, region, output, target.group, target.forecast, tuple(value.shape), dense_strides(value),
        value.dtype, value.device, _slot_dtype(value.dtype, target.history_dtype), live, row,
    )  # fmt: skip


def dense_strides(value: torch.Tensor) -> tuple[int | torch.SymInt, ...]:
    """The strides of a dense tensor, also in dimensions of size 1, where a value may carry any; symbolic ones as they
    are."""
    shape, strides = value.shape, value.stride()
    if any(isinstance(size, torch.SymInt) for size in (*shape, *strides)):
        return tuple(strides)
    dense, step = list(strides), 1
    for dim in sorted(range(value.ndim), key=lambda d: (strides[d] if shape[d] > 1 else 0, -d)):
        if shape[dim] > 1:
            dense[dim], step = step, step * shape[dim]
    for dim in reversed(range(value.ndim)):
        if shape[dim] == 1:
            dense[dim] = dense[dim + 1] * shape[dim + 1] if dim + 1 < value.ndim else 1
    return tuple(dense)


def _slot_dtype(value: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return value if wanted is None else wanted


def _subsets(groups: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return tuple(p for n in range(len(groups) + 1) for p in itertools.combinations(groups, n))


def _live_markers(graph: fx.Graph, group_of: dict[fx.Node, str], groups: Sequence[str]) -> set[fx.Node]:
    """Cuts whose forecast is read in some phase.

    A cut that is computed in a phase is itself a root of that phase once its slots are known to be read elsewhere:
    its value must be there to be kept. So this is a fixpoint; it grows at most once per cut.
    """
    live: set[fx.Node] = set()
    while True:
        before = len(live)
        for phase in _subsets(groups):
            roots = [n for n in graph.nodes if n.op == "output" or is_impure(n)]
            roots += [n for n in live if group_of[n] not in phase]
            reached = reach_back(roots, {n for n, group in group_of.items() if group in phase})
            live |= {n for n, group in group_of.items() if group in phase and n in reached}
        if len(live) == before:
            return live


def reach_back(roots: Iterable[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    """Every node that the roots depend on, not looking behind those in ``stop``."""
    reached: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in reached:
            continue
        reached.add(node)
        if node not in stop:
            stack.extend(node.all_input_nodes)
    return reached


def is_impure(node: fx.Node) -> bool:
    """Nodes that dead-code elimination must keep: the graph's ends and what writes to its inputs.

    fx's own notion also keeps seeded ops, among them every attention kernel, which have no effect but their value.
    """
    if node.op in ("placeholder", "output"):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
