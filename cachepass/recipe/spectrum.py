"""SeaCache's indicator, as an ordinary torch function that is traced into the graph.

The latents at noise level sigma are ``(1 - sigma) * signal + sigma * noise``. The filter that gives the signal back
best (Wiener's, for a signal whose power falls with a power of the frequency) passes low frequencies early in a run and
higher ones as it goes on, so a distance of filtered latents tells of changes that matter at this noise level. Source:
https://arxiv.org/abs/2602.18993, equation 7. The gain is that of diffusers 0.42.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .value import Value

_TINY = 1e-16


@dataclass(frozen=True)
class SeaFilter(Value):
    """``(latents, [sigma]) -> filtered latents (samples, C, T, H, W)``, for a probe of the latents.

    Attributes:
        power: Exponent of the clean signal's power spectrum.
        grid: (frames, height, width) or (height, width) in tokens, where latents are tokens.
        callback: ``(None, (), {name: latents}) -> [(C, T, H, W), ...]``; None: the latents as they are.
    """

    power: float
    grid: tuple[int, ...] | None = None
    callback: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", None if self.grid is None else tuple(self.grid))

    def __call__(self, latents: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        given = None if self.callback is None else self.callback(None, (), _named(latents))
        vision = _vision(latents, self.grid) if given is None else torch.stack(list(given))
        sigma = parameters[0].clamp(1e-6, 1 - 1e-6)
        spectrum = torch.fft.fftn(vision.contiguous().float(), dim=(2, 3, 4))
        gain = math.prod(_gain(vision, axis, sigma, self.power) for axis in (2, 3, 4))
        assert isinstance(gain, torch.Tensor)
        return torch.fft.ifftn(spectrum * (gain / gain.mean()), dim=(2, 3, 4)).real.to(vision.dtype)


def _gain(vision: torch.Tensor, axis: int, sigma: torch.Tensor, power: float) -> torch.Tensor:
    frequencies = torch.fft.fftfreq(vision.shape[axis], device=vision.device, dtype=torch.float32)
    clean = 1.0 / (frequencies.abs().pow(power) + _TINY)
    signal = 1.0 - sigma
    gain = signal * clean / (signal**2 * clean + sigma**2 + _TINY)
    shape = [1] * vision.ndim
    shape[axis] = -1
    return gain.reshape(shape)


def _vision(latents: torch.Tensor, grid: tuple[int, ...] | None) -> torch.Tensor:
    """``(samples, C, T, H, W)`` of videos, images ``(samples, C, H, W)`` or tokens ``(samples, S, C)``."""
    if latents.ndim == 5:
        return latents
    if latents.ndim == 4:
        return latents.unsqueeze(2)
    tokens = latents.transpose(1, 2)
    sizes = (1, 1, tokens.shape[-1]) if grid is None else (1, *grid)[-3:]
    return tokens.reshape(*tokens.shape[:2], *sizes)


def _named(latents: torch.Tensor) -> dict[str, torch.Tensor]:
    """The latents under the names that models give them."""
    return dict.fromkeys(("hidden_states", "x", "sample", "latents"), latents)
