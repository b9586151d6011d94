"""Schedules written down step by step, and cache-dit's presets of them (https://github.com/vipshop/cache-dit)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from ...errors import ConfigError, closest
from ..checks import check_int
from .base import Past, Schedule, Step, as_tuple
from .steps import Plan, number_of_steps, unbound

#: Lengths of the computed and of the predicted stretches of 28 steps, which alternate.
_PRESETS = {
    "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
    "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
    "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
    "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
}
_PRESET_STEPS = 28
_SHOWN = 64  # a longer mask is described by its counts


@dataclass(frozen=True)
class Mask(Plan):
    """One decision for each step of a run.

    Attributes:
        computed: One entry per step: 1 is computed, 0 predicted.
        beyond: Steps behind the end of ``computed`` are computed; False: predicted, as cache-dit does.

    Raises:
        ConfigError: There is no entry, or one is neither 0 nor 1.
    """

    computed: Sequence[int]
    beyond: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "computed", as_tuple(self, "computed", self.computed))
        if not self.computed:
            raise self.fail("computed", "expected at least one number, got none")
        for entry in self.computed:
            check_int(self, "computed", 0, 1, value=entry)
        if not isinstance(self.beyond, bool):
            raise self.fail("beyond", f"expected a bool, got {self.beyond!r}")

    @classmethod
    def bins(cls, computed: Sequence[int], skipped: Sequence[int], beyond: bool = True) -> Mask:
        """A mask from the lengths of its stretches: ``computed[0]`` computed, ``skipped[0]`` predicted, and so on.

        Raises:
            ConfigError: A length is no int >= 1, or there are not as many computed stretches as predicted ones, or one
                more.
        """
        steps: list[int] = []
        if len(computed) - len(skipped) not in (0, 1):
            raise ConfigError(
                f"{len(computed)} computed and {len(skipped)} predicted stretches cannot alternate",
                where="Mask.bins",
                hint="begin with a computed one and give as many predicted ones, or one less",
            )
        for run, gap in zip_longest(computed, skipped):
            for length, entry in ((run, 1), (gap, 0)):
                if length is not None:
                    check_int(cls, "bins", 1, value=length)
                    steps += [entry] * length
        return cls(steps, beyond)

    @classmethod
    def preset(cls, name: str, num_inference_steps: int = _PRESET_STEPS) -> Mask:
        """cache-dit's mask of this name: of 28 steps slow computes 18, medium 15, fast 11, ultra 8.

        For ``n`` other steps: the computed ones of the 28 are a curve of positions over their number, 0 at its one end
        and 27 at the other. It is read at ``c`` even places, ``c`` being the same share of ``n`` (rounded, at least 2),
        and stretched to 0 .. n - 1; steps that would coincide move on to the next free one. So the first and the last
        step are computed, the early ones are dense as in the original, and longer runs have more gaps and not longer
        ones.

        Raises:
            ConfigError: There is no such preset, or the number of steps is no int >= 1.
        """
        _check_preset("Mask.preset", name)
        original = cls.bins(*_PRESETS[name])
        positions = [step for step, entry in enumerate(original.computed) if entry]
        steps = number_of_steps(cls, num_inference_steps)
        chosen = set(_stretched(positions, steps))
        return cls([int(step in chosen) for step in range(steps)])

    def predicts(self, step: Step, past: Past, distance: float | None = None) -> bool | None:  # noqa: ARG002
        return self.computed[step.index] == 0 if step.index < len(self.computed) else not self.beyond

    def __str__(self) -> str:
        count = len(self.computed)
        shown = (
            "".join(map(str, self.computed)) if count <= _SHOWN else f"of {count} steps, {sum(self.computed)} computed"
        )
        return f"mask {shown}" + ("" if self.beyond else ", then predicted")


@dataclass(frozen=True)
class Preset(Schedule):
    """One of cache-dit's masks, for the run's own number of steps: ``bind`` turns it into ``Mask.preset(name, n)``.

    Attributes:
        name: ``"slow"``, ``"medium"``, ``"fast"`` or ``"ultra"``.

    Raises:
        ConfigError: There is no such preset.
    """

    name: str

    def __post_init__(self) -> None:
        _check_preset("Preset.name", self.name)

    @property
    def needs_steps(self) -> bool:
        return True

    def predicts(self, step: Step, past: Past, distance: float | None = None) -> bool | None:  # noqa: ARG002
        raise unbound(self)

    def bind(self, num_inference_steps: int | None) -> Schedule:
        return Mask.preset(self.name, number_of_steps(self, num_inference_steps))

    def __str__(self) -> str:
        return f"preset {self.name}"


def _check_preset(where: str, name: object) -> None:
    if name not in list(_PRESETS):  # a list, since the name may be anything, hashable or not
        raise ConfigError(f"there is no preset {name!r}", where=where, hint=closest(str(name), _PRESETS))


def _stretched(positions: Sequence[int], steps: int) -> list[int]:
    """The computed steps of a run of ``steps``, by the rule of ``Mask.preset``."""
    last = len(positions) - 1
    count = min(steps, max(2, round(len(positions) * steps / _PRESET_STEPS)))
    if count == 1:
        return [0]
    chosen: list[int] = []
    for k in range(count):
        whole, part = divmod(k * last, count - 1)
        between = (positions[min(whole + 1, last)] - positions[whole]) * part / (count - 1)
        ideal = math.floor((positions[whole] + between) * (steps - 1) / (_PRESET_STEPS - 1) + 0.5)
        free = chosen[-1] + 1 if chosen else 0
        chosen.append(min(max(ideal, free), steps - count + k))
    return chosen
