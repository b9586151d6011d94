"""Decide: what a call does, from the method's schedule and from what is known in its run.

Pure functions of host values: the dispatcher asks them on every call, the warm-up and the timeline of ``explain`` for
runs that have not begun.
"""

from __future__ import annotations

from ..method import Method
from ..program.plan import CachePlan
from ..recipe.schedule import Step
from ..recipe.vocabulary import PLAIN, WHOLE, GroupHistory, Route


def skips(method: Method, step: Step, *, known: bool) -> bool:
    """The unconditional branch is skipped in this step; ``known``: the difference of the two branches is kept."""
    guidance = method.guidance
    return known and guidance is not None and method.skips(step)


def route_of(method: Method, step: Step, *, known: bool, side: str | None = None, follows: bool = True) -> Route:
    """The way of a call through the model.

    Args:
        method: Says what is done with guidance.
        step: Where the call stands in its run.
        known: The difference of the two branches is kept in the call's own context.
        side: ``"cond"`` or ``"uncond"`` for one of two calls per step; None: the call brings a guidance batch.
        follows: The conditional call of this step came before the unconditional one.
    """
    guidance = method.guidance
    if guidance is None:
        return WHOLE
    if side is None:
        return guidance.half if skips(method, step, known=known) else guidance.both
    if side == "cond":
        return guidance.cond
    if not follows:
        return PLAIN  # there is nothing to compare with
    return guidance.answer if skips(method, step, known=known) else guidance.uncond


def allows(method: Method, step: Step, route: Route, *, partner_known: bool | None) -> bool:
    """Groups may be predicted on a route. ``partner_known``: the difference is kept in the context of the step's other
    call; None: there is no other call."""
    return route.predicts and (partner_known is None or skips(method, step, known=partner_known))


def asks(method: Method, group: str, step: Step, history: GroupHistory, *, probed: bool) -> bool | None:
    """Whether a group with a history is predicted; None: the probe's distance decides. ``probed``: there is a value of
    this run to measure it from."""
    answer = method.asks(group, step, history)
    return False if answer is None and not probed else answer


class Rehearsal:
    """What is known of the groups of a plan in a run that is gone through on the host, without the model.

    Where the data decide, nothing is known: such a step counts as computed for those that follow.
    """

    def __init__(self, method: Method, plan: CachePlan) -> None:
        self.method, self.plan = method, plan
        self.histories = {group: GroupHistory() for group in plan.groups}

    def asks(self, group: str, step: Step, *, allowed: bool = True) -> bool | None:
        """Whether a group is predicted in the next step; None: the data decide."""
        history = self.histories[group]
        if self.method.forgets(group, step):
            history.clear()
        return allowed and bool(history.steps) and asks(self.method, group, step, history, probed=True)

    def note(self, group: str, step: Step, *, predicted: bool) -> None:
        history = self.histories[group]
        history.note(predicted=predicted)
        if not predicted or self.plan.recursive(group):
            history.keep(step, max(self.plan.history(group), 1))
