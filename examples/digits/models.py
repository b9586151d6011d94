"""The demo's two models: how they are built, and how their shipped weights are read."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).parent
NULL_LABEL = 10  # the label that stands for "no class" in classifier-free guidance


def build_dit() -> nn.Module:
    """Diffusers' DiT for ``[batch, 1, 28, 28]`` images: 10 layers, width 128, 4 heads, 49 tokens; random weights."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=10,
        sample_size=28,
        patch_size=4,
        num_embeds_ada_norm=10,
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    return model.eval()  # its own label dropout (per block) stays off: labels are dropped by the training loop


def build_classifier() -> nn.Module:
    """A small convolutional digit classifier: ``[batch, 1, 28, 28]`` in [-1, 1] -> ``[batch, 10]`` logits."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(256, 10),
    )


def load(model: nn.Module, name: str) -> nn.Module:
    """Read fp16 weights ``name`` (a file beside this one) into ``model``, in fp32, for inference."""
    from safetensors.torch import load_file

    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(HERE / name).items()})
    return model.eval().requires_grad_(False)


def load_dit() -> nn.Module:
    return load(build_dit(), "dit.safetensors")


def load_classifier() -> nn.Module:
    return load(build_classifier(), "classifier.safetensors")


def guided_inputs(latents: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The [unconditional, conditional] batch of classifier-free guidance: ``[2B, 1, 28, 28]`` and ``[2B]``."""
    return torch.cat([latents, latents]), torch.cat([torch.full_like(labels, NULL_LABEL), labels])
