"""Guidance: the unconditional branch of classifier-free guidance, skipped on some steps and estimated from the other.

Source: FasterCache (https://arxiv.org/abs/2410.19355). The last computed difference of the two branches stands in, its
low and high spatial frequencies with a weight each (``frequency.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import torch

from ..errors import ConfigError
from .frequency import (
    LatentFormat,
    answer_unconditional,
    complete_batch,
    keep_conditional,
    keep_difference,
    keep_difference_to,
)
from .schedule import Schedule, Step
from .schedule.base import check_schedule
from .value import Value
from .vocabulary import Route


@dataclass(frozen=True)
class Ramp(Value):
    """The weight of one part of the branches' difference: 1 where it was computed, and multiplied on skipped steps.

    Attributes:
        factor: What a skipped step multiplies it by, > 0.
        within: Timesteps ``(low, high)``, both exclusive, in which it does.
        callback: Model -> factor on every skipped step, in place of both.
    """

    factor: float = 1.0
    within: tuple[float, float] = (-math.inf, math.inf)
    callback: Callable[[torch.nn.Module], float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "within", tuple(self.within))

    def at(self, step: Step, where: str) -> float:
        """The factor of a step; ``where`` the callback was given is for messages.

        Raises:
            ConfigError: There is a callback, and what was compiled is no module.
        """
        if self.callback is not None:
            return float(self.callback(model_of(step, where)))
        return self.factor if self.within[0] < step.time("the weight of a frequency") < self.within[1] else 1.0


def model_of(step: Step, callback: str) -> torch.nn.Module:
    """The model that a callback takes.

    Raises:
        ConfigError: What was compiled is no module.
    """
    if step.model is None:
        raise ConfigError(
            "takes a module, and what was compiled is not one",
            where=callback,
            hint="compile the transformer itself, not a function that calls it",
        )
    return step.model


_BOTH = Route("both", predicts=False, writes=("low", "high"), transform=keep_difference)
_HALF = Route("half", half=True, reads=("low", "high"), weighted=True, transform=complete_batch)
_COND = Route("cond", writes=("cond",), transform=keep_conditional)
_UNCOND = Route(
    "uncond", predicts=False, keeps=False, reads=("cond",), writes=("low", "high"), transform=keep_difference_to
)
_ANSWER = Route(
    "answer", predicts=False, keeps=False, reads=("cond", "low", "high"), weighted=True, transform=answer_unconditional
)


@dataclass(frozen=True)
class Guidance(Value):
    """What a recipe does with classifier-free guidance: groups are predicted only on steps that skip a branch.

    Attributes:
        schedule: Of the unconditional branch: where it predicts, the branch is skipped.
        latents: How the model's output carries its samples.
        inputs: Names of the inputs that carry guidance batches.
        strict_inputs: Those of them that must; the others may.
        low, high: Weights of the low and of the high frequencies of the branches' difference.
        group: The branch's name in schedules.
        settings: Where the user sets it up, for messages.
        slots: What is kept of the output, by name; True: in fp32 (fp64 for fp64), False: in the output's dtype.
        both, half: Routes of a guidance batch: computed in full, and on its conditional half.
        cond, uncond, answer: Routes of a step of two calls: the conditional one, the unconditional one computed, and
            answered without running the model.

    Raises:
        ConfigError: The schedule is none, or decides by a distance.
    """

    schedule: Schedule
    latents: LatentFormat
    inputs: tuple[str, ...]
    strict_inputs: tuple[str, ...]
    low: Ramp = Ramp()
    high: Ramp = Ramp()
    group: str = "unconditional"
    settings: str = field(default="Guidance", compare=False)

    slots: ClassVar[Mapping[str, bool]] = MappingProxyType({"low": True, "high": True, "cond": False})
    both: ClassVar[Route] = _BOTH
    half: ClassVar[Route] = _HALF
    cond: ClassVar[Route] = _COND
    uncond: ClassVar[Route] = _UNCOND
    answer: ClassVar[Route] = _ANSWER

    def __post_init__(self) -> None:
        check_schedule(Schedule, "schedule", self.schedule)
        for name in ("inputs", "strict_inputs"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.schedule.threshold is not None:
            raise ConfigError(
                "the unconditional branch is skipped by a plan, not by a distance",
                where="Guidance.schedule",
                hint="such as Every(5) & Timesteps(-1, 641)",
            )

    @property
    def needs_model(self) -> bool:
        return self.low.callback is not None or self.high.callback is not None

    def weights(self, step: Step, last: tuple[float, ...]) -> tuple[float, float]:
        """The weights of low and high frequencies in a step that skips the branch; ``last``: of the step before, if the
        difference was used since it was computed."""
        low, high = last or (1.0, 1.0)
        at_low = self.low.at(step, f"{self.settings}.low_frequency_weight_callback")
        return low * at_low, high * self.high.at(step, f"{self.settings}.high_frequency_weight_callback")
