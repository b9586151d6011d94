"""Cuts: where to forecast. A first look at each of some, by one run of the user's loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import OptionError
from ..recipe.cut import Blocks, Cut, Modules
from .candidates import SPREAD, fitted
from .player import Played, Player, Recording, are_alike, decibels
from .schedules import shortest_paths, step_lengths

#: Looked at where the user names none. The first that the model has is the one that others are measured by.
CUTS: tuple[Cut, ...] = (
    Blocks(),
    Blocks(residual=False),
    Modules("attention", "mlp", must_match="any"),
    Blocks(first=1),
)
_GAIN = 0.5  # decibels by which another cut must be better
_GAIN_PER_BYTES = 1.5  # and more for each doubling of what is kept


@dataclass(frozen=True)
class Look:
    """What a first look at a cut gave.

    Attributes:
        player: Runs the loop with it.
        recording: Of the first run.
        reference: That run, uncached.
        decibels: With what the recording says is best; mean over two budgets.
        forecast_share: FLOPs of a forecast step, as a share of a computed one's.
    """

    player: Player
    recording: Recording
    reference: Played
    decibels: float
    forecast_share: float

    def is_better_than(self, other: Look) -> bool:
        """By more than a first look can tell, and than its memory is worth."""
        growth = math.log2(max(self.recording.slot_bytes, 1) / max(other.recording.slot_bytes, 1))
        return self.decibels > other.decibels + _GAIN + _GAIN_PER_BYTES * max(growth, 0.0)


def look_at(player: Player, depth: int, other: Look | None) -> Look:
    """Record the first run with a cut, and try what the recording says is best, at no more FLOPs than ``other``.

    Raises:
        OptionError: Two uncached runs of one seed differ.
        CachepassError: The model has not such a cut.
    """
    played = player.play((), 0, record=True)
    recording = played.recording
    assert recording is not None
    reference = played if other is None else other.reference
    if other is None and not are_alike(player.play((), 0).result, played.result):
        raise OptionError(
            "two uncached runs of one seed differ, so nothing can be compared with them",
            where="tune",
            hint="take all random numbers from torch's default generator, or from one that sample(model, run) makes "
            "and seeds with run",
        )
    steps = len(recording.gram)
    counts = [max(1, steps // 5), max(1, steps // 3)]
    tried = [_try(player, recording, reference, count, depth) for count in counts]
    share = sum(max(0.0, each) for _, each in tried) / len(tried)
    if other is not None and share > other.forecast_share + 0.005:
        counts = [as_many_flops(count, steps, other.forecast_share, share) for count in counts]
        if min(counts) < 1:
            return Look(player, recording, reference, -math.inf, share)
        tried = [_try(player, recording, reference, count, depth) for count in counts]
    return Look(player, recording, reference, sum(score for score, _ in tried) / len(tried), share)


def as_many_flops(count: int, steps: int, share: float, other: float) -> int:
    """Computed steps of a run that takes at most the FLOPs of one with ``count`` of them, where its forecast steps take
    the share ``other`` of a computed one and those of that run ``share``."""
    budget = count + share * (steps - count)
    return math.floor((budget - other * steps) / max(1.0 - other, 1e-9) + 1e-9)


def _try(player: Player, recording: Recording, reference: Played, count: int, depth: int) -> tuple[float, float]:
    """Decibels, and the FLOPs of a forecast step as a share of a computed one's."""
    steps, scale = len(recording.gram), step_lengths(recording.timesteps)
    computed = shortest_paths(recording.gram, [count], scale)[count]
    played = player.play(fitted("", computed, recording.gram, depth, scale, SPREAD).weights, 0)
    spent = 1.0 if played.share is None else played.share
    return decibels(played.result, reference.result), (spent * steps - count) / max(steps - count, 1)


def budgets_of(counts: Sequence[int], steps: int) -> list[int]:
    """Numbers of computed steps, rising.

    Raises:
        OptionError: One is as many as a run has, so nothing is left to save.
    """
    for count in counts:
        if count >= steps:
            raise OptionError(
                f"{count} of {steps} steps are to be computed: nothing is left to save",
                where="tune.steps",
                hint=f"give less than {steps}",
            )
    return sorted(set(counts))
