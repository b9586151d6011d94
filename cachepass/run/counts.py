"""Counts: what a model did so far, of which summaries tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass, field

_EARLIER = "earlier contexts"  # what was counted in those that are no longer remembered


@dataclass
class Counts:
    """Steps of a model.

    Attributes:
        steps: Calls that succeeded.
        runs: Runs that were begun.
        computed, predicted: Steps in which a group was, by context and group.
    """

    steps: int = 0
    runs: int = 0
    computed: Counter[tuple[str, str]] = field(default_factory=Counter)
    predicted: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, context: str, computed: Iterable[str], predicted: Iterable[str], *, first: bool) -> None:
        """A step succeeded; ``first``: of its run."""
        self.steps += 1
        self.runs += first
        for group in computed:
            self.computed[context, group] += 1
        for group in predicted:
            self.predicted[context, group] += 1

    def merge(self, contexts: Set[str]) -> None:
        """Forget the names of some contexts."""
        for counts in (self.computed, self.predicted):
            for context, group in [known for known in counts if known[0] in contexts]:
                counts[_EARLIER, group] += counts.pop((context, group))
