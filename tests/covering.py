"""Some cases instead of all: every value, or every pair of values, of a test's parameters in some of them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import TypeVar

Case = TypeVar("Case", bound=Hashable)


def covering(cases: Mapping[Case, Mapping[str, str]], strength: int = 1, times: int = 1) -> set[Case]:
    """So few cases that each combination of ``strength`` parameters' values is in ``times`` of them, or in all that
    have it. ``cases``: the value of each parameter of a case. Greedy, and always the same ones."""
    found = {case: list(itertools.combinations(sorted(values.items()), strength)) for case, values in cases.items()}
    there = Counter(combination for combinations in found.values() for combination in combinations)
    missing = {combination: min(times, count) for combination, count in there.items()}
    had: Counter[tuple[tuple[str, str], ...]] = Counter()
    left, chosen = dict.fromkeys(cases), set()

    def gain(case: Case) -> tuple[int, int]:
        """How much the case brings; of those that bring as much, the one with what the others had least."""
        return sum(missing[each] > had[each] for each in found[case]), -sum(had[each] for each in found[case])

    while any(had[combination] < count for combination, count in missing.items()):
        case = max(left, key=gain)
        del left[case]
        chosen.add(case)
        had.update(found[case])
    return chosen
