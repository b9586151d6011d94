"""Models of benchmark size: the shapes of FLUX, CogVideoX and DiT, random weights, one latent each."""

from __future__ import annotations

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


def step_inputs(name: str, step: int, steps: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The keyword arguments of a step: a latent that drifts, and a timestep that falls from 950."""
    shape = SHAPES[name]
    torch.manual_seed(1)
    inputs = {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in shape.inputs().items()}
    inputs["hidden_states"] = inputs["hidden_states"] * (1 - 0.4 * step / steps)
    timestep = 950.0 - 900.0 * step / steps
    inputs["timestep"] = torch.tensor([timestep / shape.unit], device=device, dtype=torch.float32)
    return inputs
