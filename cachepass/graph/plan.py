"""The plan: every cut, slot and phase of a traced graph, known to the byte before anything runs.

    make_plan : ATen GraphModule with cut markers, targets -> CachePlan

A slot is kept only if some phase reads it: liveness walks back from the graph's outputs once per phase, stopping at
the cuts that the phase predicts. A cut whose forecast no phase reads is dead; so are its slots.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..forecast import Forecast
from ..methods import Skip, Target
from .annotate import CUT

Phase = tuple[str, ...]  # the groups that are predicted, in the plan's order


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

    @property
    def name(self) -> str:
        return f"{self.region}:{self.output}"

    @property
    def history(self) -> int:
        """Outputs kept."""
        return self.forecast.history if self.live else 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot; 0 while a size is symbolic."""
        known = [size for size in self.shape if isinstance(size, int)]
        return math.prod(known) * self.slot_dtype.itemsize if len(known) == len(self.shape) else 0


@dataclass(frozen=True)
class CachePlan:
    """What will be kept and which programs there will be.

    Attributes:
        cuts: All cuts in graph order.
        groups: Groups with at least one live cut.
        phases: Every combination of predicted groups, the all-computed one first.
        spare: One more slot per ring, so that a step never writes what it may read (the cond lowering needs it).
        skips: Regions that are not cut, with the reason.
        notes: Remarks of the method.
    """

    cuts: tuple[Cut, ...]
    groups: tuple[str, ...]
    phases: tuple[Phase, ...]
    spare: bool
    skips: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def live_cuts(self) -> tuple[Cut, ...]:
        return tuple(cut for cut in self.cuts if cut.live)

    def slots(self, cut: Cut) -> int:
        """Slots of a cut's ring."""
        return cut.history + (1 if self.spare and cut.history else 0)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all slots for one context of one model instance; symbolic sizes count as 0."""
        return sum(self.slots(cut) * cut.slot_bytes for cut in self.cuts)

    def history(self, group: str) -> int:
        """Outputs kept by the group's deepest ring."""
        return max((cut.history for cut in self.cuts if cut.group == group), default=0)

    def weighted(self, group: str) -> bool:
        """Some live cut of the group takes weights at run time."""
        return any(c.group == group and c.live and c.forecast.constant_weights is None for c in self.cuts)


NOTHING = CachePlan((), (), ((),), spare=False)  # the plan of a graph in which nothing is cached


def phase_name(phase: Phase, groups: Sequence[str]) -> str:
    """``"compute"``, ``"predict"``, or ``"predict:cross+spatial"`` where only some groups are predicted."""
    if not phase:
        return "compute"
    return "predict" if len(phase) == len(groups) else "predict:" + "+".join(phase)


def make_plan(gm: fx.GraphModule, targets: Sequence[Target], *, spare: bool = False,
              skips: Iterable[Skip] = (), notes: Iterable[str] = ()) -> CachePlan:  # fmt: skip
    """Plan the cuts whose markers stand in ``gm``."""
    by_region = {target.region.id: target for target in targets}
    markers = cut_nodes(gm.graph)
    groups = tuple(dict.fromkeys(by_region[str(node.args[1])].group for node in markers))
    live = _live_markers(gm.graph, {node: by_region[str(node.args[1])].group for node in markers}, groups)
    cuts = tuple(
        _make_cut(i, node, by_region[str(node.args[1])], node in live) for i, node in enumerate(markers)
    )  # fmt: skip
    groups = tuple(group for group in groups if any(cut.live and cut.group == group for cut in cuts))
    return CachePlan(cuts, groups, _subsets(groups), spare, tuple(skips), tuple(notes))


def cut_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The cut markers of an ATen graph, in order."""
    return graph.find_nodes(op="call_function", target=CUT)


def _make_cut(index: int, node: fx.Node, target: Target, live: bool) -> Cut:
    value: torch.Tensor = node.meta["val"]
    region, output = node.args[1:]
    assert isinstance(region, str) and isinstance(output, int)
    return Cut(
        index, region, output, target.group, target.forecast, tuple(value.shape), tuple(value.stride()),
        value.dtype, value.device, _slot_dtype(value.dtype, target.history_dtype), live,
    )  # fmt: skip


def _slot_dtype(value: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return value if wanted is None else wanted


def _subsets(groups: Sequence[str]) -> tuple[Phase, ...]:
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
            reached = _reach_back(roots, {n for n, group in group_of.items() if group in phase})
            live |= {n for n, group in group_of.items() if group in phase and n in reached}
        if len(live) == before:
            return live


def _reach_back(roots: Iterable[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
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
