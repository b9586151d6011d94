"""Findings: the plan for a model, read and printed in all its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx

from ..errors import CachepassError
from ..method import Method
from ..options import CompileOptions
from ..program.flops import count_flops
from ..program.hoist import Hoisted
from ..program.phases import Phase, phase_name
from ..program.plan import CachePlan, PlannedCut
from ..program.share import Shared, repeated_blocks
from ..program.show import diff, readable
from ..program.variants import Program
from ..recipe.vocabulary import PLAIN, PLAIN_HALF, Region, Route, Skip, Target
from .tables import human_bytes, human_flops, table
from .timeline import Lane, SimulatedCall, default_contexts, lanes, run_timesteps, simulate_calls

if TYPE_CHECKING:
    from ..gpu.estimate import GpuEstimate

_STEPS = 28  # of a run whose length nobody gave: what pipelines of this kind of model take by default


@dataclass(frozen=True)
class Findings:
    """The plan for a model, and the graph of every phase.

    Attributes:
        targets: The regions that are cut, with group and forecast.
        skips: Regions that are not cut, with the reason.
        regions: All regions of the traced graph.
        plan: Cuts, slots, bytes and phases.
        notes: Remarks of the method.
        never: Why the schedule cannot predict within a run, or None.
        model: The class of the model.
        method: The schedule.
        options: What the model was explained with.
        target: What it would be on the GPU that was asked for, if one was.
    """

    targets: tuple[Target, ...]
    skips: tuple[Skip, ...]
    regions: tuple[Region, ...]
    plan: CachePlan
    notes: tuple[str, ...]
    never: str | None
    model: str
    method: Method = field(repr=False)
    options: CompileOptions = field(repr=False)
    program: Program = field(repr=False)
    target: GpuEstimate | None = field(default=None, repr=False)
    _variants: dict[str, fx.GraphModule] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all slots, for one context."""
        return self.plan.cache_bytes

    @property
    def phases(self) -> tuple[str, ...]:
        """Names for ``graph`` and ``diff``."""
        return tuple(phase_name(phase, self.plan.groups) for phase in self.plan.phases)

    def fx_graph(self, phase: str) -> fx.Graph:
        """The graph of a phase, or of one of those that are no phase's (``"plain"``, ``"canonical"``)."""
        if phase in self._routes:
            return self.program.canonical(self._routes[phase]).gm.graph
        return self.variant(phase).graph

    def graph(self, phase: str = "canonical") -> str:
        """The readable graph of a phase; ``"plain"``: without caching, ``"canonical"``: the conditional form.

        Where calls take different routes, each has a canonical form: ``"canonical:half"``. The half-batch graph has a
        plain form too: ``"plain:half"``.
        """
        route = self._routes.get(phase) or self._phase(phase).route
        return readable(self.fx_graph(phase), self.program.names(route))

    @property
    def hoisted(self) -> Hoisted | None:
        """What is computed once per run, if anything."""
        return self.program.full.hoisted

    @property
    def _routes(self) -> dict[str, Route]:
        """Graphs that are no phase's, by name."""
        routes = dict.fromkeys(phase.route for phase in self.plan.phases)
        plain = {route.name: route for route in (PLAIN, PLAIN_HALF)[: 1 + any(route.half for route in routes)]}
        return plain | {f"canonical:{route.name}" if route.name else "canonical": route for route in routes}

    def diff(self, phase: str = "predict", context: int = 1) -> str:
        """Unified diff from the plain graph (of half the batch, for phases that run on it) to that of a phase."""
        plain = self.baseline(phase)
        return diff(self.graph(plain), self.graph(phase), fromfile=plain, tofile=phase, context=context)

    def baseline(self, phase: str) -> str:
        """The graph without caching that a phase is compared with: ``"plain"``, or ``"plain:half"`` at half batch."""
        route = self._routes.get(phase) or self._phase(phase).route
        return PLAIN_HALF.name if route.half else PLAIN.name

    @property
    def canonical_forms(self) -> tuple[str, ...]:
        """Names of the graphs with conditionals, one for each route of a call."""
        return tuple(name for name in self._routes if name.startswith("canonical"))

    def nodes(self, phase: str) -> int:
        """Number of ATen operations in a phase; also of ``"plain"``."""
        return sum(node.op == "call_function" for node in self.fx_graph(phase).nodes)

    def variant(self, phase: str) -> fx.GraphModule:
        """The program of a phase as it is lowered."""
        if phase not in self._variants:
            self._variants[phase] = self.program.specialized(self._phase(phase)).gm
        return self._variants[phase]

    def shared(self, phase: str = "predict") -> tuple[Shared, ...]:
        """What a phase's program calls for blocks that are the same, those that save most first; without
        ``share_blocks`` nothing."""
        return Shared.of(repeated_blocks(self.variant(phase).graph)) if self.options.shares else ()

    def flops(self, phase: str = "predict") -> int | None:
        """FLOPs of one call in a phase, a multiply-add counted as two; also of ``"plain"``, and of ``"once"`` (at half
        batch ``"half/once"``): what is computed once per run. None: unknown, because sizes depend on data."""
        if phase in ("once", "half/once"):
            traced = self.program.full if phase == "once" else self.program.half
            hoisted = None if traced is None else traced.hoisted
            return 0 if hoisted is None else count_flops(hoisted.once.graph)
        return count_flops(self.fx_graph(phase))

    def timeline(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        contexts: Sequence[str] | None = None,
    ) -> tuple[Lane, ...]:
        """What every group does in every step of a run, per context; nothing runs.

        Args:
            num_inference_steps: Steps of the run. None: as many as there are timesteps; without these the option of
                this name, or 28.
            timesteps: As the model gets them. None: an even descent from 1000, in the unit of the config's ranges.
            contexts: Those that the model is called in, in this order within each step. None: ``"default"``, or
                ``"cond"`` and ``"uncond"`` where the model was explained for two calls per step.

        Raises:
            OptionError: There are more or fewer timesteps than steps.
            BatchError: The model was explained for guidance batches and the contexts are those of two calls, or the
                reverse.
        """
        return lanes(self._calls(num_inference_steps, timesteps, contexts), self.plan)

    def _calls(
        self, num_inference_steps: int | None, timesteps: Sequence[float] | None, contexts: Sequence[str] | None
    ) -> tuple[SimulatedCall, ...]:
        steps = num_inference_steps or (len(timesteps) if timesteps else self.options.num_inference_steps or _STEPS)
        given = run_timesteps(steps, timesteps, self.options.timestep_scale)
        return simulate_calls(self.method, self.plan, given, contexts or default_contexts(self.plan))

    def _phase(self, name: str) -> Phase:
        if name not in self.phases:
            known = ", ".join((*self._routes, *self.phases))
            raise CachepassError(f"there is no phase {name!r}", where="explain", hint=f"phases: {known}")
        return self.plan.phases[self.phases.index(name)]

    def as_dict(self) -> dict[str, Any]:
        """What is printed, as plain values: cuts, phases with their operations, what is not cut, bytes, notes."""
        cuts = [
            {
                "region": cut.region,
                "output": cut.output,
                "group": cut.group,
                "forecast": str(cut.forecast),
                "shape": [str(size) for size in cut.shape],
                "slots": cut.history,
                "bytes": cut.history * cut.slot_bytes,
            }
            for cut in self.plan.cuts
        ]
        return {
            "cuts": cuts,
            "operations": {phase: self.nodes(phase) for phase in self.phases},
            "flops": {phase: self.flops(phase) for phase in self.phases},
            "shared": {phase: [asdict(shared) for shared in self.shared(phase)] for phase in self.phases},
            "not_cut": {skip.region: skip.reason for skip in self.skips},
            "cache_bytes": self.cache_bytes,
            "notes": list(self.notes),
            "never": self.never,
        }

    @property
    def _budget(self) -> str:
        limit = self.options.invariant_bytes
        return "" if limit is None else f" of at most {human_bytes(limit)}"

    def __str__(self) -> str:
        plan, forecasts = self.plan, {cut.name: cut for cut in self.plan.cuts}
        rows = [
            (
                cut.region,
                cut.output,
                cut.group,
                cut.forecast,
                _shape(cut.shape),
                f"{cut.history}",
                _bytes(cut) if cut.live else "dead: no phase reads it",
            )
            for cut in forecasts.values()
        ]
        if plan.output is not None:
            rows += [
                (
                    "(output)",
                    slot.name,
                    plan.output.guidance.group,
                    "guidance",
                    _shape(slot.shape),
                    "1",
                    human_bytes(slot.slot_bytes),
                )
                for slot in plan.output.slots
            ]
        text = ""
        if rows:
            text = table(("region", "out", "group", "forecast", "value", "slots", "bytes"), rows, title="cuts") + "\n"
        phases = [
            (phase, self.nodes(phase), human_flops(self.flops(phase)), Shared.told(self.shared(phase)))
            for phase in self.phases
        ]
        columns = ("phase", "operations", "FLOPs", "compiled once")
        shown = len(columns) if any(once for *_, once in phases) else 3
        text += table(columns[:shown], [row[:shown] for row in phases], title="phases")
        if self.skips:
            text += "\n" + table(("region", "reason"), [(s.region, s.reason) for s in self.skips], title="not cut")
        unknown = any(cut.sized_by_data for cut in plan.live_cuts)
        text += f"\ncache per context: {human_bytes(self.cache_bytes)} ({self.cache_bytes} B)"
        text += " and what sizes that depend on data take\n" if unknown else "\n"
        hoisted = self.hoisted
        if hoisted is not None:
            text += (
                f"kept for a run: {len(hoisted.slots)} value{'s' * (len(hoisted.slots) > 1)}, "
                f"{human_bytes(hoisted.slot_bytes)} ({hoisted.slot_bytes} B){self._budget}; {hoisted.operations} "
                "operations run once in it\n"
            )
        for note in (*self.notes, *([f"never predicts: {self.never}"] if self.never else [])):
            text += f"note: {note}\n"
        return text


def _bytes(cut: PlannedCut) -> str:
    return "as data says" if cut.sized_by_data else human_bytes(cut.history * cut.slot_bytes)


def _shape(shape: Sequence[object]) -> str:
    return "x".join(map(str, shape))
