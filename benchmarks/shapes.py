"""Models of benchmark size: the shapes of FLUX, CogVideoX and DiT, random weights, one latent each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """How to build a model and the inputs of one step.

    Attributes:
        build: Makes the model (random weights, eval mode).
        inputs: Keyword arguments of a step but the timestep.
        unit: The timestep is given to the model as ``t / unit`` for t in 0..1000.
        attention: Regex of its attention modules, for TaylorSeer.
        about: Width, blocks and tokens, for the table.
    """

    build: Callable[[], torch.nn.Module]
    inputs: Callable[[], dict[str, Any]]
    unit: float
    attention: str
    about: str


def _flux() -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=3, num_single_layers=6, attention_head_dim=64, num_attention_heads=8,
        joint_attention_dim=256, pooled_projection_dim=64, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip


def _flux_inputs() -> dict[str, Any]:
    image = torch.zeros(448, 3)
    image[:, 1], image[:, 2] = torch.arange(448) // 28, torch.arange(448) % 28
    return {
        "hidden_states": torch.randn(1, 448, 64), "encoder_hidden_states": torch.randn(1, 64, 256),
        "pooled_projections": torch.randn(1, 64), "img_ids": image, "txt_ids": torch.zeros(64, 3),
    }  # fmt: skip


def _cogvideox() -> torch.nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=8, attention_head_dim=64, in_channels=4, out_channels=4, time_embed_dim=64,
        text_embed_dim=64, num_layers=9, sample_width=30, sample_height=30, sample_frames=5, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=64,
    )  # fmt: skip


def _cogvideox_inputs() -> dict[str, Any]:
    return {"hidden_states": torch.randn(1, 2, 4, 30, 30), "encoder_hidden_states": torch.randn(1, 64, 64)}


def _dit() -> torch.nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=8, attention_head_dim=64, in_channels=4, num_layers=9, sample_size=46, patch_size=2,
        num_embeds_ada_norm=1000,
    )  # fmt: skip


def _dit_inputs() -> dict[str, Any]:
    return {"hidden_states": torch.randn(1, 4, 46, 46), "class_labels": torch.tensor([3])}


SHAPES = {
    "flux": Shape(_flux, _flux_inputs, 1000.0, r".*transformer_blocks\.\d+\.attn", "512 wide, 3+6 blocks, 512 tokens"),
    "cogvideox": Shape(_cogvideox, _cogvideox_inputs, 1.0, r"transformer_blocks\.\d+\.attn1",
                       "512 wide, 9 blocks, 514 tokens"),
    "dit": Shape(_dit, _dit_inputs, 1.0, r"transformer_blocks\.\d+\.attn1", "512 wide, 9 blocks, 529 tokens"),
}  # fmt: skip


def build(name: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model, always with the same weights; no gate is zero."""
    torch.manual_seed(0)
    model = SHAPES[name].build().eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    return model.to(device, dtype)


def timestep_of(step: int, steps: int) -> float:
    return 950.0 - 900.0 * step / steps


def step_inputs(name: str, step: int, steps: int, device: str, dtype: torch.dtype, *,
                guided: bool = False) -> dict[str, Any]:  # fmt: skip
    """The keyword arguments of a step: a latent that drifts, and a timestep that falls from 950.

    ``guided``: a batch of [unconditional, conditional], which differ in everything but latent and timestep.
    """
    shape = SHAPES[name]
    torch.manual_seed(1)
    inputs = {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in shape.inputs().items()}
    if guided:
        inputs = {k: torch.cat([torch.zeros_like(v), v]) for k, v in inputs.items() if k != "hidden_states"} | {
            "hidden_states": inputs["hidden_states"].repeat(2, *[1] * (inputs["hidden_states"].ndim - 1))
        }
    inputs["hidden_states"] = inputs["hidden_states"] * (1 - 0.4 * step / steps)
    timestep = [timestep_of(step, steps) / shape.unit] * (2 if guided else 1)
    inputs["timestep"] = torch.tensor(timestep, device=device, dtype=torch.float32)
    return inputs


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a guided step: in full, of its conditional half, and of that half's attentions."""

    full: int
    half: int
    attention: int


def count_flops(name: str) -> Flops:
    """Counted on the eager model (matrix products and attention kernels)."""
    from torch.utils.flop_counter import FlopCounterMode

    model, counts = build(name, "cpu", torch.float32), []
    attention = 0
    for guided in (True, False):
        with torch.no_grad(), FlopCounterMode(display=False, depth=None) as counter:
            model(**step_inputs(name, 0, 1, "cpu", torch.float32, guided=guided))
        counts.append(counter.get_total_flops())
        per_module = {path.partition(".")[2]: sum(ops.values()) for path, ops in counter.get_flop_counts().items()}
        attention = sum(n for path, n in per_module.items() if re.fullmatch(SHAPES[name].attention, path))
    return Flops(counts[0], counts[1], attention)
