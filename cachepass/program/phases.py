"""Phases: the kinds of step, of which each has a program of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..recipe.vocabulary import WHOLE, Route


@dataclass(frozen=True)
class Phase:
    """What a call does: the groups that are predicted, in the plan's order, and its route through the model."""

    predicted: tuple[str, ...] = ()
    route: Route = WHOLE


def phase_name(phase: Phase, groups: Sequence[str]) -> str:
    """``"compute"``, ``"predict"``, or ``"predict:cross+spatial"`` where only some groups are predicted; behind the
    route's name (``"half/predict"``), if it has one."""
    names = [phase.route.name] if phase.route.name else []
    if phase.predicted:
        names.append("predict" if len(phase.predicted) == len(groups) else "predict:" + "+".join(phase.predicted))
    return "/".join(names) or "compute"
