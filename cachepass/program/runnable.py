"""What a step asks of a program, however it was made: compiled in this process (``variants.py``) or loaded (``ship/``).

Nothing here compiles: an exported program runs where there is no compiler.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import warn
from ..recipe.frequency import wide_dtype
from ..recipe.vocabulary import WHOLE, Route
from .once import Invariants, Once
from .phases import Phase
from .plan import CachePlan
from .roles import Carried, History, Invariant, Limit, Next, Output, Parameters, Predicate, ProbeSlot, Role, Weights

if TYPE_CHECKING:
    from .rows.variant import RowRunnable
    from .share import Shared


@dataclass(frozen=True)
class LoweredVariant:
    """A variant that can run: takes its inputs as one list, the model's own first, then ``inputs`` in order.

    ``invariants``, ``scalars``, ``probes``, ``slots``, ``outputs`` and ``carried`` are the inputs in their parts: what
    is kept for a run; predicates, weights and other numbers; what the probe compares with; the cuts' slots; the slots
    of the model's output; what the program up to the decision computed. ``kept``: what the last of its results are;
    the others are the model's. ``shared``: what it calls several times.
    """

    name: str
    run: Callable[[list[Any]], Any]
    invariants: tuple[Invariant, ...]
    scalars: tuple[Predicate | Weights | Parameters | Limit, ...]
    probes: tuple[ProbeSlot, ...]
    slots: tuple[History | Next, ...]
    outputs: tuple[Output, ...]
    carried: tuple[Carried, ...]
    kept: tuple[Role, ...]
    compile_seconds: float
    nodes: int = 0
    shared: tuple[Shared, ...] = ()

    @staticmethod
    def of(
        name: str,
        run: Callable[[list[Any]], Any],
        inputs: Sequence[Role],
        kept: tuple[Role, ...],
        compile_seconds: float,
        *,
        nodes: int = 0,
        shared: tuple[Shared, ...] = (),
    ) -> LoweredVariant:
        """``inputs``: those behind the model's own."""
        parts = [tuple(role for role in inputs if isinstance(role, kinds)) for kinds in PARTS]
        lowered = LoweredVariant(name, run, *parts, kept, compile_seconds, nodes, shared)  # pyright: ignore
        assert lowered.inputs == tuple(inputs), "what is added stands in this order"
        return lowered

    @property
    def inputs(self) -> tuple[Role, ...]:
        return (*self.invariants, *self.scalars, *self.probes, *self.slots, *self.outputs, *self.carried)


PARTS: tuple[tuple[type[Role], ...], ...] = (
    (Invariant,), (Predicate, Weights, Parameters, Limit), (ProbeSlot,), (History, Next), (Output,), (Carried,),
)  # fmt: skip


class Runnable(ABC):
    """A model's programs, one for each phase of its plan.

    Attributes:
        plan: What is kept and which phases there are.
        on_cuda: Some input lies on a CUDA device.
        variants: The programs that are there, by name.
        warnings: What the user was told of it.
        weights_at: Dtype and device of each group's weights.
    """

    def __init__(self, plan: CachePlan, *, on_cuda: bool) -> None:
        self.plan, self.on_cuda = plan, on_cuda
        self.variants: dict[str, LoweredVariant] = {}
        self.warnings: list[str] = []
        self._restless: set[str] = set()  # inputs that were warned of
        self._weights: dict[tuple[object, ...], torch.Tensor] = {}
        devices = {cut.group: cut.device for cut in plan.live_cuts if cut.history}
        self.weights_at = {g: (weights_dtype(plan, g), devices[g]) for g in plan.groups if plan.weighted(g)}
        if plan.output is not None:
            group = plan.output.guidance.group
            self.weights_at[group] = weights_dtype(plan, group), plan.output.slots[0].device

    @abstractmethod
    def compile(self, phase: Phase) -> LoweredVariant:
        """The program of a phase."""

    @abstractmethod
    def compile_decision(self, route: Route) -> LoweredVariant:
        """The program up to the decision of a route, which ``splits``."""

    @abstractmethod
    def compile_once(self, route: Route) -> Once | None:
        """The program that computes what is kept for a run, if a route has one."""

    @abstractmethod
    def for_rows(self, differ: frozenset[int], seats: int) -> RowRunnable:
        """The programs for several requests at once. ``differ``: indices of the inputs that differ from row to row;
        ``seats``: how many requests may keep something.

        Raises:
            RowsError: There are none, with the reason.
        """

    def side_by_side(self) -> AbstractContextManager[None]:
        """Programs that are compiled in this block wait for each other's kernels; none of them may run in it."""
        return nullcontext()

    @abstractmethod
    def invariants(self, route: Route) -> Invariants | None:
        """What a route keeps for a run, if anything: the same object each time."""

    @abstractmethod
    def flops(self, phase: Phase) -> int | None:
        """FLOPs of one call in a phase; None: unknown."""

    @abstractmethod
    def flops_once(self, route: Route = WHOLE) -> int | None:
        """FLOPs of what is computed once per run."""

    @abstractmethod
    def input_name(self, route: Route, index: int) -> str:
        """What the user calls one of the model's own inputs."""

    @property
    @abstractmethod
    def computed_once(self) -> list[str]:
        """Paths of the modules that would be cut, and are computed once per run."""

    def splits(self, route: Route) -> bool:
        """The host decides in the middle of a call on this route."""
        return self.plan.probe is not None and not self.plan.returns and route.predicts

    def warn_restless(self, route: Route, index: int, *, varies: bool) -> None:
        """An input is another tensor at every step; ``varies``: with other values."""
        name = self.input_name(route, index)
        if name not in self._restless:
            self._restless.add(name)
            if varies:
                advice = f'if it is meant to change, say so with options["varying_inputs"] = ["{name}"]'
            else:
                advice = (
                    "its values were the same. Give the same tensor object in all steps of a run, or say that they "
                    f'stay so, with options["invariant_inputs"] = ["{name}"]'
                )
            warn(
                f"the input {name} is another tensor at every step, so what depends on it alone is computed each time: "
                + advice,
                self.warnings,
            )

    def device_tensor(
        self, name: str, numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Numbers on the device, made once per set of values: a schedule that repeats copies nothing.

        On an accelerator the copy starts from pinned memory and does not wait for the device.
        """
        key = (name, numbers)
        tensor = self._weights.get(key)
        if tensor is None:
            with torch.inference_mode(False):
                tensor = torch.tensor(numbers, dtype=dtype)
                if device.type == "cuda":
                    tensor = tensor.pin_memory()
                tensor = tensor.to(device, non_blocking=True)
            if len(self._weights) >= 4096:
                self._weights.clear()
            self._weights[key] = tensor
        return tensor


def decision_name(route: Route) -> str:
    """The name of the program up to the decision of a route."""
    return "/".join(part for part in (route.name, "decide") if part)


def once_name(*, half: bool) -> str:
    """The name of the program that computes what is kept for a run, of full or of half batches."""
    return "half/once" if half else "once"


def weights_dtype(plan: CachePlan, group: str) -> torch.dtype:
    """fp32; fp64 if a cut of the group (the model's output, for the guidance's group) is fp64."""
    dtypes = {wide_dtype(cut.dtype) for cut in plan.live_cuts if cut.group == group and cut.history}
    if plan.output is not None and group == plan.output.guidance.group:
        dtypes |= {slot.slot_dtype for slot in plan.output.slots}
    return torch.float64 if torch.float64 in dtypes else torch.float32
