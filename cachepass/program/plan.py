"""The plan: every cut, slot and phase of a traced graph, known to the byte before anything runs.

    make_plan : ATen GraphModule with cut markers, targets -> CachePlan

A slot is kept only if some phase reads it: liveness walks back from the graph's outputs once per phase, stopping at
the cuts that the phase predicts. A cut whose forecast no phase reads is dead; so are its slots.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import _torch
from ..capture.markers import base_of, cut_nodes, output_nodes, probe_node, reach_back
from ..errors import ConfigError
from ..recipe.forecast import Forecast
from ..recipe.frequency import LatentFormat, wide_dtype
from ..recipe.guidance import Guidance
from ..recipe.value import Value
from ..recipe.vocabulary import WHOLE, ProbeTarget, Route, Skip, Target
from .liveness import live_markers, subsets
from .phases import Phase
from .slots import NamedSlot, bytes_of, dense_strides


@dataclass(frozen=True)
class PlannedCut(Value):
    """One value that may be replaced by a forecast.

    Attributes:
        index: Position among the plan's cuts.
        region, output: The region's id and which of its outputs.
        group, forecast: Its schedule, and what stands in for it.
        shape, stride, dtype, device: Of the value. Sizes may be symbolic.
        slot_dtype: Dtype in which its history is kept.
        live: Some phase reads its forecast; if not, it has no slots.
        row: Which region of its group it belongs to: where weights differ by region, its row of them.
        residual: What is kept and forecast is the value minus what the region was given.
        sized_by_data: Only running the graph tells its size: programs return it, and no slot is made ahead.
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
    residual: bool = False
    sized_by_data: bool = False

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
        return bytes_of(self.shape, self.slot_dtype)


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
    latents: LatentFormat
    slots: tuple[NamedSlot, ...]
    halved: bool

    @property
    def slot_bytes(self) -> int:
        return sum(slot.slot_bytes for slot in self.slots)

    @property
    def routes(self) -> tuple[Route, ...]:
        guidance = self.guidance
        return (guidance.both, guidance.half) if self.halved else (guidance.cond, guidance.uncond, guidance.answer)


@dataclass(frozen=True)
class ProbePlan:
    """What a decision looks at: the method's probe, and the slot for the value that it is compared with.

    ``residual``: the value is a difference, to what its region was given.
    """

    probe: ProbeTarget
    slot: NamedSlot
    residual: bool


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
    from_gram: bool
    rows: int


def _group_plan(cuts: Sequence[PlannedCut]) -> _GroupPlan:
    live = [cut for cut in cuts if cut.live]
    paths = tuple(dict.fromkeys(cut.region.split("@")[0] for cut in cuts))
    return _GroupPlan(
        history=max(cut.history for cut in cuts),
        weighted=any(cut.forecast.constant_weights is None for cut in live),
        recursive=any(cut.forecast.recursive for cut in live),
        weight_regions=paths if any(cut.forecast.per_region for cut in cuts) else ("",),
        from_gram=any(cut.forecast.from_gram for cut in live),
        rows=1 + max((cut.row for cut in live), default=0),
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
        probe: What decisions are made from, if they are made from data.
        process_group: Ranks that run one model together: what is measured, is measured over all of them.
    """

    cuts: tuple[PlannedCut, ...]
    groups: tuple[str, ...]
    phases: tuple[Phase, ...]
    returns: bool
    skips: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()
    output: OutputPlan | None = None
    probe: ProbePlan | None = None
    process_group: Any = None

    @property
    def live_cuts(self) -> tuple[PlannedCut, ...]:
        return tuple(cut for cut in self.cuts if cut.live)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all slots for one context of one model instance (for guidance by two calls: for the pair of their
        contexts); symbolic sizes count as 0."""
        probe = 0 if self.probe is None else self.probe.slot.slot_bytes
        return self.cut_bytes + (0 if self.output is None else self.output.slot_bytes) + probe

    @property
    def cut_bytes(self) -> int:
        """The bytes of the cuts' slots alone."""
        return sum(cut.history * cut.slot_bytes for cut in self.cuts)

    def layout(self, resolve: Callable[[object], int], prefix: str = "") -> Layout:
        """What the plan keeps, once the symbolic sizes have values, below the module of the path ``prefix``."""
        return Layout(
            (
                self.returns,
                *(
                    (
                        c.region.removeprefix(prefix),
                        c.output,
                        c.group,
                        c.forecast,
                        # Of a dead cut nothing is kept: its sizes are asked of no input.
                        tuple(map(resolve, c.shape)) if c.live and not c.sized_by_data else (),
                        tuple(map(resolve, c.stride)) if c.live and not c.sized_by_data else (),
                        c.slot_dtype,
                        c.device,
                        c.live,
                        c.residual,
                    )
                    for c in self.cuts
                ),
                *(() if self.probe is None else (self.probe.probe.every, *map(resolve, self.probe.slot.shape))),
            )
        )

    @property
    def sizes(self) -> list[int | torch.SymInt]:
        """All sizes and strides of the live cuts, and of the probe's slot, but those that depend on data."""
        slots = [
            *(c for c in self.live_cuts if not c.sized_by_data),
            *(() if self.probe is None else (self.probe.slot,)),
        ]
        return [size for slot in slots for size in (*slot.shape, *slot.stride)]

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

    def from_gram(self, group: str) -> bool:
        """Weights of the group come of the inner products of what is kept."""
        return group in self._schedule and self._schedule[group].from_gram

    def weight_count(self, group: str) -> int:
        """Weights of the group in all: for each row as many as its deepest ring has slots."""
        return self.history(group) * (self._schedule[group].rows if group in self._schedule else 1)

    @functools.cached_property
    def _schedule(self) -> dict[str, _GroupPlan]:
        """Asked on every step, so no walk over the cuts may be behind it."""
        return {
            group: _group_plan([c for c in self.cuts if c.group == group])
            for group in dict.fromkeys(c.group for c in self.cuts)
        }

    @property
    def scheduled(self) -> tuple[str, ...]:
        """Everything that is scheduled: the groups, and the guidance's."""
        return self.groups if self.output is None else (*self.groups, self.output.guidance.group)


def make_plan(
    gm: fx.GraphModule,
    targets: Sequence[Target],
    *,
    returns: bool = False,
    skips: Iterable[Skip] = (),
    notes: Iterable[str] = (),
    guidance: Guidance | None = None,
    latents: LatentFormat | None = None,
    halved: bool = False,
    probe: ProbeTarget | None = None,
    process_group: Any = None,
) -> CachePlan:
    """Plan the cuts whose markers stand in ``gm``; with ``halved`` that is the graph of the conditional half."""
    target_of = {target.region.id: target for target in targets}
    markers = cut_nodes(gm.graph)
    group_of = {node: target_of[str(node.args[1])].group for node in markers}
    groups = tuple(dict.fromkeys(group_of.values()))
    live = live_markers(gm.graph, group_of, groups)
    rows: dict[str, list[str]] = {}
    cuts = []
    for i, node in enumerate(markers):
        target = target_of[str(node.args[1])]
        row = _row(rows.setdefault(target.group, []), target, live=node in live)
        cuts.append(_make_cut(i, node, target, node in live, row))
    groups = tuple(group for group in groups if any(cut.live and cut.group == group for cut in cuts))
    if probe is not None:
        groups = groups or (probe.group,)  # nothing is cut: the run is measured
        _refuse_circle(gm.graph, group_of)
    output = None
    if guidance is not None:
        output = _plan_output(gm, guidance, latents or guidance.latents, halved)
    routes = (WHOLE,) if output is None else output.routes
    phases = tuple(Phase(p, route) for route in routes for p in (subsets(groups) if route.predicts else [()]))
    return CachePlan(
        tuple(cuts),
        groups,
        phases,
        returns,
        tuple(skips),
        tuple(notes),
        output,
        _plan_probe(gm.graph, probe),
        process_group,
    )


def _refuse_circle(graph: fx.Graph, group_of: Mapping[fx.Node, str]) -> None:
    """A decision is taken before what it is about.

    Raises:
        ConfigError: The probe looks at something behind a cut.
    """
    marker = probe_node(graph)
    behind = [] if marker is None else [cut for cut in group_of if cut in reach_back([marker], set())]
    if behind and marker is not None:
        raise ConfigError(
            f"what the probe looks at ({marker.args[1]}) depends on what it decides on ({behind[0].args[1]})",
            where="probe",
            hint="look at something earlier, or cut less: Blocks(first=...) computes the first blocks",
        )


def _plan_probe(graph: fx.Graph, probe: ProbeTarget | None) -> ProbePlan | None:
    marker = probe_node(graph)
    if probe is None or marker is None:
        return None
    value: torch.Tensor = marker.meta["val"]
    if probe.transform is not None:
        with _torch.fake_mode_of([n.meta.get("val") for n in graph.find_nodes(op="placeholder")]), torch.no_grad():
            value = probe.transform(value, torch.empty(probe.parameters, device=value.device))
    slot = NamedSlot(str(marker.args[1]), tuple(value.shape), dense_strides(value), value.dtype, value.device)
    return ProbePlan(probe, slot, base_of(marker) is not None)


def _row(rows: list[str], target: Target, *, live: bool) -> int:
    """Calls of one module share their weights; weights that come of what is kept are each cut's own."""
    if target.forecast.from_gram:
        if live:
            rows.append(f"{len(rows)}")
        return max(len(rows) - 1, 0)
    if not target.forecast.per_region:
        return 0
    if target.region.path not in rows:
        rows.append(target.region.path)
    return rows.index(target.region.path)


def _plan_output(gm: fx.GraphModule, guidance: Guidance, latents: LatentFormat, halved: bool) -> OutputPlan:
    values: list[torch.Tensor] = [node.meta["val"] for node in output_nodes(gm.graph)]
    sample = values[0]
    shape = (len(values), *sample.shape) if latents.listed else tuple(sample.shape)
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    dtypes = {True: wide_dtype(sample.dtype), False: sample.dtype}
    routes = (guidance.both, guidance.half) if halved else (guidance.cond, guidance.uncond)
    written = {name for route in routes for name in route.writes}
    slots = [
        NamedSlot(name, shape, tuple(strides), dtypes[wide], sample.device)
        for name, wide in guidance.slots.items()
        if name in written
    ]
    return OutputPlan(guidance, latents, tuple(slots), halved)


def _make_cut(index: int, node: fx.Node, target: Target, live: bool, row: int) -> PlannedCut:
    value: torch.Tensor = node.meta["val"]
    region, output = node.args[1:3]
    assert isinstance(region, str) and isinstance(output, int)
    return PlannedCut(
        index,
        region,
        output,
        target.group,
        target.forecast,
        tuple(value.shape),
        dense_strides(value),
        value.dtype,
        value.device,
        _slot_dtype(value.dtype, target.history_dtype),
        live,
        row,
        base_of(node) is not None,
        _torch.depends_on_data(value),
    )


def _slot_dtype(value: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return value if wanted is None else wanted
