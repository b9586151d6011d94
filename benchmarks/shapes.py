"""Models of benchmark size: the shapes of five diffusers transformers, random weights, one latent each.

``flux-6``, ``flux-18``, ``flux-57`` and ``wan-30`` are as deep as the name says, for compile times. ``flux-dev``,
``wan-1.3b`` and ``wan-14b`` have the sizes of the published models and want a GPU, ``flux-dev-9`` and ``wan-1.3b-6``
the same with fewer blocks; the others run on two CPU cores.
"""

from __future__ import annotations

import functools
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
        blocks: Regex of all of its blocks but the first, which cache-dit always computes.
        about: Width, blocks and tokens, for the table.
        large: So large that several do not fit into a device's memory together.
    """

    build: Callable[[], torch.nn.Module]
    inputs: Callable[[], dict[str, Any]]
    unit: float
    attention: str
    blocks: str
    about: str
    large: bool = False


def _flux(**sizes: Any) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        from diffusers import FluxTransformer2DModel

        small = {
            "num_layers": 3,
            "num_single_layers": 6,
            "attention_head_dim": 64,
            "num_attention_heads": 8,
            "joint_attention_dim": 256,
            "pooled_projection_dim": 64,
            "axes_dims_rope": (16, 24, 24),
        }
        return FluxTransformer2DModel(patch_size=1, in_channels=64, **(small | sizes))

    return make


def _flux_inputs(
    rows: int, columns: int, text: int, width: int, pooled: int, *, guidance: bool = False
) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        tokens = rows * columns
        image = torch.zeros(tokens, 3)
        image[:, 1], image[:, 2] = torch.arange(tokens) // columns, torch.arange(tokens) % columns
        inputs = {
            "hidden_states": torch.randn(1, tokens, 64),
            "encoder_hidden_states": torch.randn(1, text, width),
            "pooled_projections": torch.randn(1, pooled),
            "img_ids": image,
            "txt_ids": torch.zeros(text, 3),
        }
        return inputs | ({"guidance": torch.full((1,), 3.5)} if guidance else {})

    return make


def _cogvideox() -> torch.nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=8,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        time_embed_dim=64,
        text_embed_dim=64,
        num_layers=9,
        sample_width=30,
        sample_height=30,
        sample_frames=5,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=64,
    )


def _cogvideox_inputs() -> dict[str, Any]:
    return {"hidden_states": torch.randn(1, 2, 4, 30, 30), "encoder_hidden_states": torch.randn(1, 64, 64)}


def _dit() -> torch.nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=8,
        attention_head_dim=64,
        in_channels=4,
        num_layers=9,
        sample_size=46,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )


def _dit_inputs() -> dict[str, Any]:
    return {"hidden_states": torch.randn(1, 4, 46, 46), "class_labels": torch.tensor([3])}


def _pixart() -> torch.nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=8,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=9,
        cross_attention_dim=512,
        sample_size=44,
        patch_size=2,
        caption_channels=256,
        use_additional_conditions=False,
    )


def _pixart_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 44, 44),
        "encoder_hidden_states": torch.randn(1, 120, 256),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _wan(**sizes: Any) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        from diffusers import WanTransformer3DModel

        small = {"num_attention_heads": 4, "attention_head_dim": 128, "ffn_dim": 2048, "num_layers": 8, "text_dim": 256}
        return WanTransformer3DModel(
            patch_size=(1, 2, 2), in_channels=16, out_channels=16, freq_dim=256, **(small | sizes)
        )

    return make


def _wan_inputs(frames: int, rows: int, columns: int, text: int, width: int) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "hidden_states": torch.randn(1, 16, frames, rows, columns),
        "encoder_hidden_states": torch.randn(1, text, width),
    }


_FLUX_ATTENTION, _FLUX_BLOCKS = r".*transformer_blocks\.\d+\.attn", r"[^.]*transformer_blocks\.[1-9]\d*"
_BLOCK_ATTENTION, _BLOCKS = r"transformer_blocks\.\d+\.attn1", r"transformer_blocks\.[1-9]\d*"
_WAN = r"blocks\.\d+\.attn[12]", r"blocks\.[1-9]\d*"


def _flux_dev(layers: int, single: int, about: str, *, large: bool = False) -> Shape:
    model = _flux(
        num_layers=layers, num_single_layers=single, attention_head_dim=128, num_attention_heads=24,
        joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
    )  # fmt: skip
    inputs = _flux_inputs(64, 64, 512, 4096, 768, guidance=True)
    return Shape(model, inputs, 1000.0, _FLUX_ATTENTION, _FLUX_BLOCKS, f"3072 wide, {about}", large)


def _wan_large(layers: int, about: str, *, large: bool = False) -> Shape:
    model = _wan(num_attention_heads=12, ffn_dim=8960, num_layers=layers, text_dim=4096)
    return Shape(model, _wan_inputs(21, 60, 104, 512, 4096), 1.0, *_WAN, f"1536 wide, {about}", large)


def _flux_deep(layers: int, single: int) -> Shape:
    model, inputs = _flux(num_layers=layers, num_single_layers=single), _flux_inputs(16, 28, 64, 256, 64)
    about = f"512 wide, {layers}+{single} blocks, 512 tokens"
    return Shape(model, inputs, 1000.0, _FLUX_ATTENTION, _FLUX_BLOCKS, about)


SHAPES = {
    "toy": Shape(
        _flux(num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
              pooled_projection_dim=16, axes_dims_rope=(4, 6, 6)),
        _flux_inputs(4, 4, 8, 32, 16), 1000.0, _FLUX_ATTENTION, _FLUX_BLOCKS, "32 wide, 1+1 blocks, 24 tokens",
    ),
    "flux": _flux_deep(3, 6),
    "flux-6": _flux_deep(2, 4),
    "flux-18": _flux_deep(6, 12),
    "flux-57": _flux_deep(19, 38),
    "cogvideox": Shape(_cogvideox, _cogvideox_inputs, 1.0, _BLOCK_ATTENTION, _BLOCKS, "512 wide, 9 blocks, 514 tokens"),
    "dit": Shape(_dit, _dit_inputs, 1.0, _BLOCK_ATTENTION, _BLOCKS, "512 wide, 9 blocks, 529 tokens"),
    "pixart": Shape(_pixart, _pixart_inputs, 1.0, r"transformer_blocks\.\d+\.attn[12]", _BLOCKS,
                    "512 wide, 9 blocks, 484 tokens, 120 of text"),
    "wan": Shape(_wan(), _wan_inputs(2, 30, 32, 512, 256), 1.0, *_WAN, "512 wide, 8 blocks, 480 tokens, 512 of text"),
    "wan-30": Shape(_wan(num_layers=30), _wan_inputs(2, 30, 32, 512, 256), 1.0, *_WAN,
                    "512 wide, 30 blocks, 480 tokens, 512 of text"),
    "flux-dev": _flux_dev(19, 38, "19+38 blocks, 4608 tokens, 12 B parameters", large=True),
    "flux-dev-9": _flux_dev(3, 6, "9 of FLUX.1-dev's 57 blocks, 4608 tokens"),
    "wan-1.3b": _wan_large(30, "30 blocks, 32760 tokens, 512 of text", large=True),
    "wan-14b": Shape(
        _wan(num_attention_heads=40, ffn_dim=13824, num_layers=40, text_dim=4096), _wan_inputs(21, 60, 104, 512, 4096),
        1.0, *_WAN, "5120 wide, 40 blocks, 32760 tokens, 512 of text", large=True,
    ),
    "wan-1.3b-6": _wan_large(6, "6 of Wan-1.3B's 30 blocks, 32760 tokens, 512 of text"),
}  # fmt: skip
SMALL = ("flux", "cogvideox", "dit", "pixart", "wan")


def build(name: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model, always with the same weights; no gate is zero."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # in fp32 the largest would not fit
    try:
        with torch.device(device):
            model = SHAPES[name].build().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters() if device != "meta" else ():
        if not parameter.any():
            parameter.normal_(std=0.02)
    return model.to(device, dtype)


def timestep_of(step: int, steps: int) -> float:
    return 950.0 - 900.0 * step / steps


@functools.cache
def _base_inputs(name: str, device: str, dtype: torch.dtype, guided: bool) -> dict[str, Any]:
    torch.manual_seed(1)

    def cast(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: cast(v) for k, v in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        value = value.to(device, dtype) if value.is_floating_point() else value.to(device)
        return torch.cat([torch.zeros_like(value), value]) if guided else value

    inputs = cast(SHAPES[name].inputs())
    if guided:
        latent = inputs["hidden_states"].chunk(2)[1]
        inputs["hidden_states"] = torch.cat([latent, latent])
    return inputs


def step_inputs(
    name: str, step: int, steps: int, device: str, dtype: torch.dtype, *, guided: bool = False
) -> dict[str, Any]:
    """The keyword arguments of a step: a latent that drifts, a timestep that falls from 950, and, as pipelines do it,
    the same tensors for all else in every step.

    ``guided``: a batch of [unconditional, conditional], which differ in everything but latent and timestep.
    """
    inputs = dict(_base_inputs(name, device, dtype, guided))
    inputs["hidden_states"] = inputs["hidden_states"] * (1 - 0.4 * step / steps)
    timestep = [timestep_of(step, steps) / SHAPES[name].unit] * (2 if guided else 1)
    inputs["timestep"] = torch.tensor(timestep, device=device, dtype=torch.float32)
    return inputs
