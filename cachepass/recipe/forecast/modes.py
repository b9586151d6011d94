"""Dynamic mode decomposition: outputs forecast as a sum of damped oscillations.

One linear map is sought that takes each output to the next. Its modes are combinations of the outputs kept, so a
prediction is one too, and everything that the fit asks of the outputs are their inner products: n outputs of any size
are replaced by the n columns of a matrix with the same Gram matrix, which differ from them by a rotation only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..checks import check_int, check_number
from .differences import taylor_weights
from .form import Forecast
from .rule import ForecastRule, Gram

MIN_SNAPSHOTS = 4
MAX_HISTORY = 32

# Singular values below this share of the largest are noise and carry no mode.
_NOISE = 1e-4
# Those of a Gram matrix in float64 are squares, so below this share nothing is left of the outputs' own.
_RESOLVED = 1e-7

_Rows = tuple[tuple[float, ...], ...]
# Newest first: a row per output with its share in each mode at horizon 0; and the modes' factors per gap.
_Modes = tuple[tuple[tuple[complex, ...], ...], tuple[complex, ...]]


@dataclass(frozen=True)
class DMD(ForecastRule):
    """Dynamic mode decomposition (Schmid 2010, https://doi.org/10.1017/S0022112010001217), as cache-dit's of the name.

    Exact for outputs that are sums of as many damped oscillations as the history can tell apart: one that decays takes
    one gap, one that oscillates takes two. The fit runs over the newest outputs at even gaps, at least 4 of them, and
    advances the newest output by any fraction of a gap. With fewer than 4 the forecast is ``Taylor(1)``; where the fit
    fails or overflows, the newest output is reused.

    The weights depend on the outputs: ``weights`` needs their Gram matrix, accumulated in float64. A mode at the limit
    of 1e-4 is 1e-8 of the inner products, which is less than float32 rounds off.

    Attributes:
        history: Number of outputs kept, 4 to 32. Long ones average over dynamics that change.
        rank: Number of modes at most, up to ``history - 1``; those that float64 inner products cannot resolve (below
            1e-7 of the strongest) are left out. 0: all above 1e-4 of the strongest.
        ridge: Added to the singular values that are divided by, >= 0, in the unit of the outputs.

    Raises:
        ConfigError: A field has a value that cannot be used.
    """

    history: int = 6
    rank: int = 0
    ridge: float = 1e-8

    needs_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_int(self, "history", MIN_SNAPSHOTS, MAX_HISTORY)
        check_int(self, "rank", 0, self.history - 1)
        check_number(self, "ridge", 0)

    @property
    def form(self) -> Forecast:
        return Forecast(f"dmd({self.history})", history=self.history, from_gram=True)

    def derive(self, nodes: tuple[float, ...], at: float) -> Sequence[float]:
        """The weights without a fit: ``Taylor(1)``."""
        return (*taylor_weights(1, nodes[:2], at), *(0.0,) * (len(nodes) - 2))

    def weights(self, nodes: Sequence[float], at: float, gram: Gram | None = None) -> tuple[float, ...]:
        """Weights of the outputs kept, newest first, for a prediction at the position ``at``.

        Args:
            nodes: Positions of the outputs kept, newest first; those beyond ``history`` are ignored.
            at: The position to predict, in the same unit.
            gram: ``gram[i][j]`` is the inner product of outputs i and j, newest first, in float64: one row and column
                per node, or more, which are ignored. Not looked at where fewer than 4 outputs lie at even gaps.

        Returns:
            ``history`` numbers; 0.0 for outputs that are missing or not made use of.

        Raises:
            ValueError: ``gram`` is needed and not given, or has fewer rows or columns than outputs are fitted.
        """
        count = _even_tail(nodes[: self.history])
        if count < MIN_SNAPSHOTS:
            return super().weights(nodes, at)
        modes = _decompose(_corner(gram, count), self.rank, self.ridge)
        horizon = (at - nodes[0]) / (nodes[0] - nodes[1])
        advanced = _advance(modes, horizon) if modes is not None else None
        used = advanced if advanced is not None else (1.0,)
        return (*used, *(0.0,) * (self.history - len(used)))


def _even_tail(nodes: Sequence[float]) -> int:
    """How many of the newest nodes lie at even gaps: one application of the map spans one gap."""
    if len(nodes) < 2 or nodes[0] == nodes[1]:
        return min(len(nodes), 1)
    gap, count = nodes[0] - nodes[1], 2
    while count < len(nodes) and math.isclose(nodes[count - 1] - nodes[count], gap, rel_tol=1e-6):
        count += 1
    return count


def _corner(gram: Gram | None, count: int) -> _Rows:
    """The Gram matrix of the ``count`` newest outputs, as something that can be remembered by."""
    if gram is None:
        raise ValueError("DMD.weights needs the Gram matrix of the outputs kept")
    rows = gram.tolist() if isinstance(gram, torch.Tensor) else gram
    corner = tuple(tuple(float(value) for value in row[:count]) for row in rows[:count])
    if len(corner) != count or any(len(row) != count for row in corner):
        raise ValueError(f"DMD.weights needs a Gram matrix of at least {count} rows and columns")
    return corner


@functools.lru_cache(maxsize=1024)
def _decompose(gram: _Rows, rank: int, ridge: float) -> _Modes | None:
    """The modes of outputs with this Gram matrix; None where there are none to be had.

    Remembered: between two computed steps only the horizon changes.
    """
    inner = torch.tensor(gram, dtype=torch.float64, device="cpu").flip(0, 1)  # oldest first, as time runs
    if not inner.isfinite().all():
        return None
    try:
        squares, axes = torch.linalg.eigh((inner + inner.T) / 2)
        outputs = squares.clamp(min=0).sqrt()[:, None] * axes.T  # a column per output
        before, after = outputs[:, :-1], outputs[:, 1:]
        u, s, vh = torch.linalg.svd(before, full_matrices=False)
        kept = max(1, int((s > s[0] * (_RESOLVED if rank else _NOISE)).sum()))
        kept = min(kept, rank) if rank else kept
        # What the map makes of each of the strongest directions, as combinations of the outputs behind `after`.
        combinations = vh[:kept].T / (s[:kept] + ridge)
        factors, vectors = torch.linalg.eig(u[:, :kept].T @ after @ combinations)
        combinations = combinations.to(torch.complex128) @ vectors
        modes, newest = after.to(torch.complex128) @ combinations, outputs[:, -1:].to(torch.complex128)
        amplitudes = torch.linalg.lstsq(modes, newest).solution[:, 0]
    except torch.linalg.LinAlgError:
        return None
    shares = (combinations * amplitudes).flip(0)
    return tuple(map(tuple, shares.tolist())), tuple(factors.tolist())


def _advance(modes: _Modes, horizon: float) -> tuple[float, ...] | None:
    """Weights of the newest outputs ``horizon`` gaps ahead of the newest; None where they are not finite.

    Modes come in conjugate pairs, so what is imaginary cancels; of a mode that changes its sign at each gap, between
    the gaps the real part is taken.
    """
    shares, factors = modes
    try:
        powers = [factor**horizon for factor in factors]
        weights = tuple(sum(s * p for s, p in zip(row, powers, strict=True)).real for row in shares)
    except (OverflowError, ZeroDivisionError):
        return None
    return weights if all(map(math.isfinite, weights)) else None
