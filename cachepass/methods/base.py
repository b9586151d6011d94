"""What a method is: which regions it cuts, what forecasts them, and when. Host code only: no fx node comes here."""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import ConfigError, NoMatchError, listing
from ..recipe.forecast import Forecast
from ..recipe.frequency import Latents
from ..recipe.schedule import Bound, Past, Step


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

    def matches(self, identifier: str, match: Callable[[str, str], object] = re.fullmatch) -> bool:
        """The identifier is the region's kind (``"attention"``, ``"mlp"``, ``"block"``) or a regex for its path."""
        kinds = {"attention": self.is_attention, "mlp": self.is_mlp, "block": self.is_block}
        return kinds.get(identifier, False) or bool(match(identifier, self.path))


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
class Probe:
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
    """A method's choice among the regions of a graph.

    Raises:
        ConfigError: Forecasts of one group keep their outputs differently. A group has one history, which says when
            outputs were kept and how many of them count, and one list of weights; so forecasts of two depths would read
            outputs that are others than the weights are for. Those that keep nothing agree with all.
    """

    targets: tuple[Target, ...]
    skips: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()
    probe: Probe | None = None

    def __post_init__(self) -> None:
        first: dict[str, Target] = {}
        for target in self.targets:
            if target.forecast.history == 0:
                continue
            known = first.setdefault(target.group, target)
            if _keeping(known.forecast) != _keeping(target.forecast):
                raise ConfigError(
                    f"the forecasts of one group keep their outputs alike: {known.region.id} has {known.forecast} "
                    f"({_keeping(known.forecast)}), {target.region.id} has {target.forecast} "
                    f"({_keeping(target.forecast)})", where=f"group {target.group!r}",
                    hint="give each of them a group of its own",
                )  # fmt: skip


def _keeping(forecast: Forecast) -> str:
    """How a forecast's outputs are kept and weighed, in words."""
    flags = {"predictions too": forecast.recursive, "weights per region": forecast.per_region,
             "weights from what is kept": forecast.from_gram}  # fmt: skip
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

    @property
    def past(self) -> Past:
        """What schedules may ask."""
        return dataclasses.replace(self.tally, computed=tuple(self.steps))

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


@dataclass(frozen=True)
class Guidance:
    """What a method does with classifier-free guidance.

    Attributes:
        group: The schedule of the unconditional branch.
        latents: The model's output, handed to the routes' transforms.
        settings: Where the user sets it up, for messages: the config class.
        inputs: Names of the inputs that carry guidance batches.
        strict_inputs: Those of them that must; the others may.
        slots: What is kept of the output, by name; True: in fp32 (fp64 for fp64), False: in the output's dtype.
        both, half: Routes of a guidance batch: computed in full, and on its conditional half.
        cond, uncond, answer: Routes of a step of two calls: the conditional one, the unconditional one computed, and
            answered without running the model.
    """

    group: str
    latents: Latents
    settings: str
    inputs: tuple[str, ...]
    strict_inputs: tuple[str, ...]
    slots: Mapping[str, bool]
    both: Route
    half: Route
    cond: Route
    uncond: Route
    answer: Route


class Method(ABC):
    """A caching method: a config made executable."""

    #: The config; each method narrows the type.
    config: Any

    #: The schedule reads the timestep.
    needs_timestep: bool = False

    #: It forecasts regions; if not, it only keeps what stays the same within a run.
    cuts: bool = True

    #: Its weights are functions of the model's modules.
    needs_model: bool = False

    #: What is done with classifier-free guidance; None: nothing.
    guidance: Guidance | None = None

    #: Every step is measured, and none is predicted on purpose.
    measures: bool = False

    #: It cuts spans of blocks, or has a probe.
    streams: bool = False

    def bind(self, num_inference_steps: int | None) -> None:  # noqa: B027 (most do not ask)
        """The steps of a run, if they are known; told once, before anything else is asked."""

    @abstractmethod
    def select(self, regions: Sequence[Region], model: Sequence[str] | None = None) -> Selection:
        """Choose regions, their groups and forecasts; NoMatchError if a pattern of the user's finds nothing.

        ``model``: the regions are those of one part of a model whose modules have these paths. What finds nothing in it
        may do so in another part: no error and no warning.
        """

    def check(self, regions: Sequence[Region], model: Sequence[str]) -> None:  # noqa: ARG002 (for methods that need more)
        """``regions`` are those of all parts of a model whose modules have the paths ``model``: raise what
        ``select`` would for the whole one, and NoMatchError for what is needed and lies outside of every part.
        """
        self.select(regions)

    @abstractmethod
    def predicts(self, group: str, step: Step) -> bool:
        """The schedule: True if the group is predicted at this step, given that it has a history."""

    def decides(
        self,
        group: str,
        step: Step,
        history: GroupHistory,  # noqa: ARG002
        distance: float | None = None,  # noqa: ARG002
    ) -> bool | None:
        """As ``predicts``, for schedules that ask what was done in the run, or what the probe says: None as long as the
        ``distance`` of the probe is needed and not given. The history has at least one step."""
        return self.predicts(group, step)

    def forgets(self, group: str, step: Step) -> bool:  # noqa: ARG002
        """What is kept of the group does not count from this step on."""
        return False

    def bound(self, group: str, history: GroupHistory) -> Bound:
        """What ``decides`` compares the distance with, where it has no answer without."""
        raise NotImplementedError

    def probe_parameters(self, step: Step) -> tuple[float, ...]:  # noqa: ARG002
        """For the probe's ``transform``."""
        return ()

    @abstractmethod
    def never_predicts(self, num_inference_steps: int | None) -> str | None:
        """The reason why no step of a run can be predicted, or None if one may be."""

    def weights(self, group: str, step: Step, history: GroupHistory, region: str = "") -> tuple[float, ...]:
        """Weights for a predicted step, newest output first; only asked for forecasts without constant weights.

        ``region`` is the path of the module whose output is forecast, where the forecast says ``per_region``.
        """
        raise NotImplementedError

    def why_idle(self, timesteps: tuple[float, float] | None) -> str:
        """Why a whole run predicted nothing, for the warning; ``timesteps`` is the (lowest, highest) seen."""
        seen = f"; timesteps seen: {timesteps[0]:g} to {timesteps[1]:g}" if timesteps else ""
        return "the schedule chose to compute every step" + seen


def no_match(where: str, patterns: Sequence[str], candidates: Sequence[str], more: str = "") -> NoMatchError:
    """The error for patterns that match no module of the traced graph."""
    return NoMatchError(
        f"{', '.join(map(repr, patterns))} matches no module that the model calls",
        where=where, hint=f"{more}candidates: {listing(candidates)}",
    )  # fmt: skip
