"""What a method is: which regions it cuts, what forecasts them, and when. Host code only: no fx node comes here."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import NoMatchError, listing
from ..forecast import Forecast
from ..frequency import Latents


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
    """

    id: str
    path: str
    class_name: str
    is_attention: bool = False
    is_cross: bool = False
    is_mlp: bool = False
    is_block: bool = False

    @property
    def kind(self) -> str:
        if self.is_attention:
            return "cross-attention" if self.is_cross else "attention"
        return "mlp" if self.is_mlp else "block" if self.is_block else "module"

    def matches(self, identifier: str, match: Callable[[str, str], object] = re.fullmatch) -> bool:
        """The identifier is the region's kind (``"attention"``, ``"mlp"``, ``"block"``) or a regex for its path."""
        kinds = {"attention": self.is_attention, "mlp": self.is_mlp, "block": self.is_block}
        return kinds.get(identifier, False) or bool(match(identifier, self.path))


@dataclass(frozen=True)
class Skip:
    """A region that is not cut, and why."""

    region: str
    reason: str


@dataclass(frozen=True)
class Target:
    """A region to cut: the group that schedules it, the forecast of its outputs and the dtype they are kept in."""

    region: Region
    group: str
    forecast: Forecast
    history_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Selection:
    """A method's choice among the regions of a graph."""

    targets: tuple[Target, ...]
    skips: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """Where a call stands within its run: step index from 0, the timestep if it is known, and the model called."""

    index: int
    timestep: float | None = None
    model: torch.nn.Module | None = field(default=None, repr=False)


@dataclass
class GroupHistory:
    """The steps at which a group's kept outputs were computed, newest first, and the last weights used since."""

    steps: list[int] = field(default_factory=list)
    weights: tuple[float, ...] = ()


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
