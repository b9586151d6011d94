"""Calibration: the numbers that some methods need for a checkpoint, measured in a run that predicts nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..config import CacheConfig, MagCacheConfig
from ..errors import ConfigError
from ..inspect.summary import summary
from ..recipe.cut import Blocks, ModelOutput, ModuleOutput, Probe
from ..recipe.schedule import Threshold
from ..run.context import DEFAULT


def mag_ratios(model: torch.nn.Module | Callable[..., Any], context: str = DEFAULT) -> tuple[float, ...]:
    """MagCache's ratios, as the last run of a context measured them, for ``MagCacheConfig(mag_ratios=...)``.

    Of each step the mean over all tokens of ``|r| / |r of the step before|``, where ``r`` is what the blocks add to the
    latents' stream (https://arxiv.org/abs/2506.09045); 1 for the first.

    Args:
        model: Compiled with ``MagCacheConfig(calibrate=True)``, and called for a whole run.

    Raises:
        NotCompiledError: It was not compiled with ``backend="cached_inductor"``, or not called.
        ConfigError: It was compiled with another config, or made no run in this context.
    """
    found = summary(model)
    if found.method != MagCacheConfig.__name__ or context not in found.distances:
        raise ConfigError(
            f"nothing was measured in the context {context!r}",
            where="mag_ratios",
            hint="compile with MagCacheConfig(calibrate=True), and call the model for a whole run. "
            f"contexts: {', '.join(found.distances) or '(none)'}",
        )
    return tuple(1.0 if distance is None else distance for distance in found.distances[context])


@dataclass(frozen=True)
class TeaCacheFit:
    """A fit for TeaCache.

    Attributes:
        coefficients: Of the polynomial, highest order first, for ``TeaCacheConfig(coefficients=...)``.
        distances: Relative L1 distance of the probed value from the step before, by step from the second on.
        changes: That of the model's output.
        error: Root mean square of what the fit leaves of ``changes``.
    """

    coefficients: tuple[float, ...]
    distances: tuple[float, ...]
    changes: tuple[float, ...]
    error: float


def fit_teacache(
    model: torch.nn.Module, run: Callable[[Callable[..., Any]], object], *, module: str | None = None, degree: int = 4
) -> TeaCacheFit:
    """Fit the polynomial by which TeaCache foretells how much the model's output changes from one step to the next.

    Args:
        model: Not compiled; it is in the end as it was.
        run: Makes one whole run with the model that it is given; it is called twice, and must do the same.
        module: As ``TeaCacheConfig.module``.
        degree: Of the polynomial, 1 to 6; the paper's is 4. A run has to have more steps than that.

    Raises:
        ConfigError: The degree is out of range, or the run has too few steps for it.
    """
    if isinstance(degree, bool) or not isinstance(degree, int) or not 1 <= degree <= 6:
        raise ConfigError(f"{degree!r} is out of range", where="fit_teacache.degree", hint="allowed: 1 to 6")
    distances, changes = (_measured(model, run, probe) for probe in (ModuleOutput(module), ModelOutput()))
    if len(distances) <= degree + 1 or len(distances) != len(changes):
        raise ConfigError(
            f"{len(distances)} and {len(changes)} distances were measured in the two runs",
            where="fit_teacache",
            hint=f"both runs must be alike, of more than {degree + 2} steps",
        )
    x, y = torch.tensor(distances, dtype=torch.float64), torch.tensor(changes, dtype=torch.float64)
    # Scaled to the unit interval: powers of small distances would lose the fit in rounding.
    scale = x.abs().max().clamp_min(1e-300)
    powers = torch.arange(degree, -1, -1, dtype=torch.float64)
    matrix = (x / scale)[:, None] ** powers
    solution = torch.linalg.lstsq(matrix, y[:, None]).solution[:, 0]
    error = (matrix @ solution - y).square().mean().sqrt().item()
    return TeaCacheFit(tuple((solution / scale**powers).tolist()), distances, changes, error)


def _measured(model: torch.nn.Module, run: Callable[[Callable[..., Any]], object], probe: Probe) -> tuple[float, ...]:
    config = CacheConfig(cut=Blocks(), schedule=Threshold(0.0), probe=probe)
    options: Any = {"cache": config, "lowering": "eager"}
    compiled = torch.compile(model, backend="cached_inductor", fullgraph=True, options=options)
    run(compiled)
    found = summary(compiled).distances
    return tuple(distance for steps in found.values() for distance in steps if distance is not None)
