"""The words in which recipes and graphs speak of each other. Host code only: no fx node comes here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .forecast import Forecast
from .schedule import Past, Step


@dataclass(frozen=True)
class Region:
    """One call of a module in the traced graph.

    Attributes:
        id: The path, and ``@n`` behind it for the n-th further call of the same module.
        path: Module path below the compiled module (``blocks.0.attn``).
        class_name: Name of the module's class.
        is_attention: It owns an attention computation.
        is_cross: Its keys do not depend on the input that its queries come from (attention only).
        is_mlp: It is a feed-forward.
        is_block: It is one of a list of blocks: an entry of a ModuleList that holds attentions or feed-forwards.
        blocks: Ids of the consecutive blocks that it spans, where it is more than one call of a module (``span_of``).
    """

    id: str
    path: str
    class_name: str
    is_attention: bool = False
    is_cross: bool = False
    is_mlp: bool = False
    is_block: bool = False
    blocks: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        if self.is_attention:
            return "cross-attention" if self.is_cross else "attention"
        if self.blocks:
            return "blocks"
        return "mlp" if self.is_mlp else "block" if self.is_block else "module"

    def is_of(self, kind: str) -> bool:
        """It is of a kind: ``"attention"``, ``"self-attention"``, ``"cross-attention"``, ``"mlp"`` or ``"block"``."""
        kinds = {
            "attention": self.is_attention,
            "self-attention": self.is_attention and not self.is_cross,
            "cross-attention": self.is_attention and self.is_cross,
            "mlp": self.is_mlp,
            "block": self.is_block,
        }
        return kinds.get(kind, False)

    def matches(self, identifier: str, match: Callable[[str, str], object] = re.fullmatch) -> bool:
        """The identifier is a kind that the region is of, or a regex for its path."""
        return self.is_of(identifier) or bool(match(identifier, self.path))


def span_of(blocks: Sequence[Region]) -> Region:
    """The region of consecutive blocks, in the order of their calls: ``blocks.1..blocks.5``."""
    first, last = blocks[0], blocks[-1]
    name = first.id if len(blocks) == 1 else f"{first.id}..{last.id}"
    return Region(name, name, first.class_name, blocks=tuple(block.id for block in blocks))


@dataclass(frozen=True)
class Skip:
    """A region that is not cut, and why."""

    region: str
    reason: str


@dataclass(frozen=True)
class Target:
    """A region to cut: the group that schedules it, the forecast of its outputs and the dtype they are kept in.

    ``residual``: what is forecast is output minus input, for each stream that runs through the region.
    """

    region: Region
    group: str
    forecast: Forecast
    history_dtype: torch.dtype | None = None
    residual: bool = False


@dataclass(frozen=True)
class ProbeTarget:
    """A value computed early in a step that tells how far the step is from the last one.

    Its distance from the value kept is ``mean |p - q| / mean |q|`` (relative L1), one number per step.

    Attributes:
        group: The schedule that gets the distance.
        region: Where the value is found: the output of this region, of its main stream if it is a span of blocks.
            None: the value is the latents, the model's input.
        of_model: The value is the model's output.
        output: Which of the region's outputs, where it is no span.
        residual: The value is the span's output minus its input.
        every: The value is kept at every step; False: at computed ones only.
        per_sample: One distance for each sample of the batch; their mean counts.
        metric: ``"relative_l1"``, or ``"magnitude"``: the mean growth of the norms along the last dimension.
        transform: ``(value, parameters) -> value``, a torch function applied to it before it is compared and kept;
            ``parameters`` is a vector of what ``Method.probe_parameters`` says in the step.
        parameters: Their number.
    """

    group: str
    region: Region | None = None
    of_model: bool = False
    output: int = 0
    residual: bool = False
    every: bool = False
    per_sample: bool = False
    metric: str = "relative_l1"
    transform: Callable[..., Any] | None = None
    parameters: int = 0


@dataclass(frozen=True)
class Selection:
    """A method's choice among the regions of a graph."""

    targets: tuple[Target, ...]
    skips: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()
    probe: ProbeTarget | None = None


def keeping(forecast: Forecast) -> str:
    """How a forecast's outputs are kept and weighed, in words."""
    flags = {
        "predictions too": forecast.recursive,
        "weights per region": forecast.per_region,
        "weights from what is kept": forecast.from_gram,
    }
    outputs = f"{forecast.history} output{'s' if forecast.history > 1 else ''}"
    return ", ".join((outputs, *(flag for flag, given in flags.items() if given)))


NO_PAST = Past()


@dataclass
class GroupHistory:
    """What is known of a group in a run.

    Attributes:
        steps: Those at which its kept outputs were computed, newest first.
        timesteps: Those of these steps.
        weights: The last ones used since.
        tally: What else is counted; its ``computed`` stays empty.
        gram: Inner products of the kept outputs, newest first, for each cut of the group, where its forecast asks for
            them.
    """

    steps: list[int] = field(default_factory=list)
    timesteps: list[float | None] = field(default_factory=list)
    weights: tuple[float, ...] = ()
    tally: Past = NO_PAST
    gram: Sequence[torch.Tensor] = ()
    _known: tuple[Past, list[int], Past] = field(default=(NO_PAST, [], NO_PAST), init=False, repr=False, compare=False)

    @property
    def past(self) -> Past:
        """What schedules may ask. Asked at every call, so made when it changed."""
        tally, steps, known = self._known
        if tally is not self.tally or steps != self.steps:
            known = dataclasses.replace(self.tally, computed=tuple(self.steps), timesteps=tuple(self.timesteps))
            self._known = self.tally, list(self.steps), known
        return known

    def note(self, *, predicted: bool, distance: float | None = None) -> None:
        """The group was predicted, or computed, in a step. ``distance``: what the probe measured in it."""
        tally = self.tally
        measured = tally.measured + (distance if distance is not None and distance > 0 else 0.0)
        if predicted:
            distances = tally.distances if distance is None else (*tally.distances, distance)
            self.tally = Past((), tally.skipped + 1, tally.streak + 1, distances, measured)
        elif tally.streak or measured != tally.measured:
            self.tally = Past((), tally.skipped, 0, (), measured)

    def keep(self, step: Step, capacity: int) -> None:
        """An output of this step was kept, in place of the oldest of so many."""
        self.steps.insert(0, step.index)
        self.timesteps.insert(0, step.timestep)
        del self.steps[capacity:], self.timesteps[capacity:]

    def clear(self) -> None:
        """Nothing is known any more."""
        self.steps.clear()
        self.timesteps.clear()
        self.weights, self.tally = (), NO_PAST


@dataclass(frozen=True, eq=False)
class Route:
    """One way of a call through the model: on which batch it runs, and what becomes of the model's output.

    Attributes:
        name: For people; empty: the model as it is.
        half: Runs on the conditional half of a guidance batch.
        predicts: Groups may be predicted on it.
        keeps: What is computed on it is kept.
        reads, writes: Names of the guidance's slots that ``transform`` takes and returns.
        weighted: ``transform`` takes the weights of the guidance's group.
        transform: ``(latents, values, *reads, [weights]) -> (values, *writes)``, a torch function; None: identity.
    """

    name: str = ""
    half: bool = False
    predicts: bool = True
    keeps: bool = True
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    weighted: bool = False
    transform: Callable[..., tuple[Any, ...]] | None = None


WHOLE = Route()
PLAIN = Route("plain", predicts=False, keeps=False)  # the model as it would be without a cache
PLAIN_HALF = Route("plain:half", half=True, predicts=False, keeps=False)
