"""Schedules: which steps to compute, from a Gram matrix alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from .fitting import fit_jointly

Steps = tuple[int, ...]
_LONGEST = 16  # steps between two computed ones that are looked at, unless the budget needs more


def spread_evenly(count: int, steps: int, warm_up: int, *, last: bool) -> Steps:
    """``count`` steps: the first ``warm_up``, and the others evenly; ``last``: up to the last step of the run."""
    warm_up = min(warm_up, count)
    rest = count - warm_up
    end = steps - 1 if last else steps - 1 - (steps - warm_up) / (rest + 1)
    chosen = list(range(warm_up))
    for i in range(1, rest + 1):
        place = math.floor(warm_up - 1 + (end - warm_up + 1) * i / rest + 0.5)
        latest = steps - 1 - rest + i  # that leaves room for the others
        chosen.append(min(max(place, chosen[-1] + 1), latest))
    return tuple(chosen)


def shortest_paths(gram: torch.Tensor, counts: Sequence[int], scale: Sequence[float]) -> dict[int, Steps]:
    """For each number of computed steps those that leave the smallest sum of squared errors, each step being fitted by
    itself from the last two outputs: dynamic programming over the last two computed steps."""
    steps, most = len(gram), max(counts)
    longest = max(_LONGEST, 2 * math.ceil(steps / min(counts)))
    errors = _two_outputs(gram, torch.tensor(list(scale), dtype=torch.float64))
    # layer k: (last but one, last) -> the least error of a run with k computed steps so far, and the pair before.
    layers: list[dict[tuple[int, int], tuple[float, tuple[int, int] | None]]] = [{(-1, 0): (0.0, None)}]
    for _ in range(most - 1):
        layer: dict[tuple[int, int], tuple[float, tuple[int, int] | None]] = {}
        for (before, last), (error, _way) in layers[-1].items():
            row = errors[before][last]
            for nxt in range(last + 1, min(steps, last + 1 + longest)):
                total = error + row[nxt] - row[last + 1]
                if (last, nxt) not in layer or total < layer[last, nxt][0]:
                    layer[last, nxt] = total, (before, last)
        layers.append(layer)
    return {count: _path(layers[:count], errors, steps) for count in counts}


def _two_outputs(gram: torch.Tensor, scale: torch.Tensor) -> list[list[list[float]]]:
    """``[before][last][i]``: the sum over the steps below i of the squared errors of forecasting each from two outputs
    under weights that sum to 1; ``before`` -1: from one. Sums from step 0 on, of which differences are taken."""
    steps = len(gram)
    norm = gram.diagonal()
    one = (norm[None, :] - 2 * gram + norm[:, None]).clamp_min(0.0)  # [last, i]
    # r_i - r_l against r_p - r_l, for all p, l, i.
    inner = gram[:, None, :] - gram[:, :, None] - gram[None, :, :] + norm[None, :, None]  # [p, l, i]
    square = one.T[:, :, None]  # [p, l]
    two = (one[None] - torch.where(square > 0, inner.square() / square.clamp_min(1e-300), 0.0)).clamp_min(0.0)
    both = torch.cat([two, one[None]])  # index -1: one output alone
    sums = torch.zeros(steps + 1, steps, steps + 1, dtype=torch.float64)
    sums[:, :, 1:] = (both * scale.square()).cumsum(2)
    return sums.tolist()


def _path(
    layers: Sequence[dict[tuple[int, int], tuple[float, tuple[int, int] | None]]],
    errors: Sequence[Sequence[Sequence[float]]],
    steps: int,
) -> Steps:
    def whole(pair: tuple[int, int]) -> float:
        before, last = pair
        return layers[-1][pair][0] + errors[before][last][steps] - errors[before][last][last + 1]

    pair: tuple[int, int] | None = min(layers[-1], key=whole)
    chosen = []
    for layer in reversed(layers):
        assert pair is not None
        chosen.append(pair[1])
        pair = layer[pair][1]
    return tuple(reversed(chosen))


def neighbours(computed: Steps, steps: int, reach: int = 3) -> Iterator[Steps]:
    """Schedules that differ in the place of one computed step; the first stays."""
    for step in computed[1:]:
        yield from _moved(computed, step, steps, reach)


def _moved(computed: Steps, step: int, steps: int, reach: int = 3) -> Iterator[Steps]:
    """The schedule with one of its steps at other places, the nearest ones first."""
    for place in (step + sign * near for near in range(1, reach + 1) for sign in (-1, 1)):
        if 0 < place < steps and place not in computed:
            yield tuple(sorted({*computed, place} - {step}))


def descend(computed: Steps, error: Callable[[Steps], float], steps: int, rounds: int = 4) -> Steps:
    """Move one computed step after the other while that lowers ``error``."""
    best = error(computed)
    for _ in range(rounds):
        before = best
        for step in computed[1:]:
            for candidate in _moved(computed, step, steps):
                if (found := error(candidate)) < 0.999 * best:
                    computed, best = candidate, found
                    break
        if best == before:
            break
    return computed


def grown(computed: Steps, count: int, gram: torch.Tensor, scale: Sequence[float]) -> Steps:
    """A schedule with more computed steps than a given one: each time the one that helps most."""
    while len(computed) < count:
        free = [step for step in range(len(gram)) if step not in computed]
        computed = min(
            (tuple(sorted((*computed, step))) for step in free),
            key=lambda steps: fit_jointly(gram, steps, 2, scale, 1.0).error,
        )
    return computed


def step_lengths(timesteps: Sequence[float]) -> list[float]:
    """How far the sampler goes in each step, as a share of its way; the last step as far as the one before."""
    lengths = [abs(b - a) for a, b in itertools.pairwise(timesteps)]
    lengths.append(lengths[-1] if lengths else 1.0)
    total = sum(lengths) or 1.0
    return [length / total or 1.0 / len(lengths) for length in lengths]
