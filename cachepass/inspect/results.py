"""Results of a sampling loop: tensors, arrays, images, or what a pipeline returns, as one tensor or as pictures."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..errors import OptionError

_FIELDS = ("images", "frames", "videos", "sample", "latents")  # of what pipelines return


def as_tensor(result: Any) -> torch.Tensor:
    """All numbers of a result, in fp32 on the CPU. Images of 8 bits are in 0 to 1.

    Raises:
        OptionError: It holds none.
    """
    if isinstance(result, torch.Tensor):
        return result.detach().float().cpu()
    for name in _FIELDS:
        if hasattr(result, name):
            return as_tensor(getattr(result, name))
    if isinstance(result, (list, tuple)):
        parts = [as_tensor(part) for part in result] or [torch.empty(0)]
        alike = all(part.shape == parts[0].shape for part in parts)
        return torch.stack(parts) if alike else torch.cat([part.flatten() for part in parts])
    if hasattr(result, "tobytes") and hasattr(result, "convert"):  # an image of Pillow's
        image = result.convert("RGB")
        width, height = image.size
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3) / 255.0
    if hasattr(result, "__array__"):
        return torch.as_tensor(result.__array__()).float()
    raise OptionError(
        f"the sampling loop returned a {type(result).__name__}",
        where="compare",
        hint="let it return a tensor, an array, images, a list of these, or what the pipeline returns",
    )


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 norm of the difference over that of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


def psnr(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in decibels; the peak is the range of what is expected. Infinite where equal."""
    error = float((found.double() - expected.double()).square().mean())
    peak = float(expected.max() - expected.min())
    return math.inf if error == 0 else 10 * math.log10(max(peak, 1e-300) ** 2 / error)


def as_pictures(result: Any, most: int = 8) -> list[Any]:
    """The first images of a result, as Pillow's: its own, or a tensor of 1 or 3 channels in 0 to 1 or -1 to 1; of a
    video the middle frame. Empty: it holds none, or Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError:
        return []
    for name in _FIELDS[:3]:
        if hasattr(result, name):
            return as_pictures(getattr(result, name), most)
    if isinstance(result, Image.Image):
        return [result]
    if isinstance(result, (list, tuple)):
        frames = [video[len(video) // 2] if isinstance(video, (list, tuple)) and video else video for video in result]
        return [picture for part in frames[:most] for picture in as_pictures(part, 1)][:most]
    tensor = as_tensor(result) if isinstance(result, torch.Tensor) or hasattr(result, "__array__") else torch.empty(0)
    if tensor.ndim == 5:  # (batch, channels, frames, height, width), or with the frames in front
        tensor = tensor[:, :, tensor.shape[2] // 2] if tensor.shape[1] in (1, 3) else tensor[:, tensor.shape[1] // 2]
    tensor = tensor[None] if tensor.ndim == 3 else tensor
    if tensor.ndim == 4 and tensor.shape[-1] in (1, 3) and tensor.shape[1] not in (1, 3):
        tensor = tensor.permute(0, 3, 1, 2)
    if tensor.ndim != 4 or tensor.shape[1] not in (1, 3):
        return []
    low, high = (-1.0, 1.0) if tensor.min() < 0 else (0.0, 1.0)
    pixels = ((tensor[:most] - low) / (high - low)).clamp(0, 1).mul(255).round().to(torch.uint8)
    rows = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()
    return [Image.frombytes("RGB", (row.shape[1], row.shape[0]), bytes(row.flatten().tolist())) for row in rows]
