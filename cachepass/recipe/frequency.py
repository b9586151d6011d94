"""FasterCache's estimate of the unconditional output, as ordinary torch functions that are traced into the graph.

FasterCache adds the last step's difference of the two branches to the conditional output in the frequency domain, with
one weight for the low spatial frequencies and one for the rest. The transform is linear, so the two parts of the
difference are taken back to the spatial domain once, on the step that computes both branches:

    D = uncond - cond,   D_low = irfft2(disc * rfft2(D)),   D_high = D - D_low
    uncond' = cond + a_low * D_low + a_high * D_high

A step that skips the unconditional branch then holds no Fourier transform, and the history is real (half of the memory
of complex spectra). Source: https://arxiv.org/abs/2410.19355, equations 9 to 11; the disc is that of its reference
implementation, of radius ``min(H, W) // 5`` around frequency zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..errors import OutputError
from .value import Value

OUTPUT_WEIGHTS = ("low", "high")  # what the weights of a skipped step belong to, in order
RANKS = {"BCFHW": 5, "BFCHW": 5, "BCHW": 4, "BSC": 3}


@dataclass(frozen=True)
class LatentFormat(Value):
    """How a model's output carries its samples.

    Attributes:
        tensor_format: ``"BCFHW"``, ``"BFCHW"``, ``"BCHW"`` or ``"BSC"``.
        grid: For ``"BSC"``: (frames, height, width) or (height, width) of the tokens.
        unconditional_first: A guidance batch is [uncond, cond], not [cond, uncond].
        listed: The batch is a list of samples, each without the batch dimension.
    """

    tensor_format: str
    grid: tuple[int, ...] | None = None
    unconditional_first: bool = True
    listed: bool = False

    def batch(self, values: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(values) if self.listed else values[0]

    def values(self, batch: torch.Tensor) -> list[torch.Tensor]:
        return list(batch.unbind(0)) if self.listed else [batch]

    def halves(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A guidance batch as (uncond, cond)."""
        first, second = batch.chunk(2, 0)
        return (first, second) if self.unconditional_first else (second, first)

    def join(self, uncond: torch.Tensor, cond: torch.Tensor) -> list[torch.Tensor]:
        """Both halves in as many values as there are of one: a tensor of double size, or each sample's pair."""
        halves = [uncond, cond] if self.unconditional_first else [cond, uncond]
        return list(torch.stack(halves, 1).unbind(0)) if self.listed else [torch.cat(halves, 0)]

    def check(self, shape: tuple[int, ...], where: str) -> None:
        """Raise OutputError if a batch of this shape is no image or video in this format."""
        rank, text = RANKS[self.tensor_format], "x".join(map(str, shape))
        if len(shape) != rank:
            fitting = [name for name, r in RANKS.items() if r == len(shape)]
            hint = " or ".join(f'tensor_format="{name}"' for name in fitting)
            if "BSC" in fitting:
                height = max(side for side in range(1, math.isqrt(shape[1]) + 1) if shape[1] % side == 0)
                hint += (
                    f", latent_grid=(height, width) or (frames, height, width) of its {shape[1]} tokens, such as "
                    f"({height}, {shape[1] // height})"
                )
            raise OutputError(
                f'the model\'s output is {text}, tensor_format="{self.tensor_format}" has {rank} dimensions',
                where=where,
                hint=hint or "the output is no image or video: it has no spatial frequencies to split",
            )
        if self.grid is not None and math.prod(self.grid) != shape[1]:
            raise OutputError(
                f"latent_grid={self.grid} has {math.prod(self.grid)} tokens, the model's output {text} has {shape[1]}",
                where=where,
                hint="give the grid of the tokens, in the model's order of them",
            )


def low_frequencies(x: torch.Tensor) -> torch.Tensor:
    """The part of real planes ``[..., H, W]`` with frequencies in the disc of radius ``min(H, W) // 5``."""
    height, width = x.shape[-2:]
    radius = min(height, width) // 5
    rows = torch.arange(height, device=x.device)
    rows = torch.minimum(rows, height - rows)
    columns = torch.arange(width // 2 + 1, device=x.device)
    disc = (rows[:, None] ** 2 + columns**2 <= radius**2).to(x.dtype)
    # Made contiguous: for other strides the transforms' results have strides of their own, which differ by version.
    spectrum = torch.view_as_real(torch.fft.rfft2(x.contiguous())) * disc[..., None]
    return torch.fft.irfft2(torch.view_as_complex(spectrum), s=(height, width))


def split_difference(
    uncond: torch.Tensor, cond: torch.Tensor, latents: LatentFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(D_low, D_high)`` of ``uncond - cond``, in fp32 (fp64 for fp64)."""
    wide = wide_dtype(cond.dtype)
    difference = uncond.to(wide) - cond.to(wide)
    if latents.grid is None:
        low = low_frequencies(difference)
    else:
        planes = difference.transpose(1, 2).unflatten(-1, latents.grid)
        low = low_frequencies(planes).flatten(2).transpose(1, 2)
    low = low.contiguous()
    return low, difference - low


def estimate_unconditional(
    cond: torch.Tensor, low: torch.Tensor, high: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """``cond + weights[0] * D_low + weights[1] * D_high`` in the dtype of ``cond``."""
    return (cond.to(low.dtype) + weights[0] * low + weights[1] * high).to(cond.dtype)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtype`` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- what a call's route does with the output: (latents, values, *slots read, [weights]) -> (values, *slots written)


Values = list[torch.Tensor]


def keep_difference(latents: LatentFormat, values: Values) -> tuple[Values, torch.Tensor, torch.Tensor]:
    """A guidance batch: keep the difference of its halves."""
    uncond, cond = latents.halves(latents.batch(values))
    return values, *split_difference(uncond, cond, latents)


def complete_batch(
    latents: LatentFormat, values: Values, low: torch.Tensor, high: torch.Tensor, weights: torch.Tensor
) -> tuple[Values]:
    """The conditional half of a guidance batch: estimate the other half and put them together."""
    cond = latents.batch(values)
    return (latents.join(estimate_unconditional(cond, low, high, weights), cond),)


def keep_conditional(latents: LatentFormat, values: Values) -> tuple[Values, torch.Tensor]:
    """The conditional call of a step: keep its output."""
    return values, latents.batch(values)


def keep_difference_to(
    latents: LatentFormat, values: Values, cond: torch.Tensor
) -> tuple[Values, torch.Tensor, torch.Tensor]:
    """The unconditional call of a step: keep its difference to the conditional one."""
    return values, *split_difference(latents.batch(values), cond, latents)


def answer_unconditional(
    latents: LatentFormat,
    values: Values,
    cond: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    weights: torch.Tensor,
) -> tuple[Values]:
    """The unconditional call of a step, answered from the conditional one: ``values`` are not read."""
    del values
    return (latents.values(estimate_unconditional(cond, low, high, weights)),)
