"""Real diffusers pipelines, made offline of tiny random components; prompts are embeddings, latents come out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from zoo import ZOO, build


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _flow(**config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


@dataclass(frozen=True)
class Case:
    """A pipeline of diffusers.

    Attributes:
        make: Builds it, always with the same weights.
        inputs: Keyword arguments of its call but the number of steps and the generator.
        calls: Calls of the transformer in each step.
        context: Of its calls, where the pipeline names them itself.
        latents: ``tensor_format`` of its output.
        grid: Its ``latent_grid``, for tokens.
        unconditional_first: The order of that batch.
    """

    make: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    calls: int = 1
    contexts: tuple[str, ...] = ()
    latents: str = ""
    grid: tuple[int, ...] | None = None
    unconditional_first: bool = True

    def run(self, pipe: Any, steps: int, seed: int = 0, **more: Any) -> torch.Tensor:
        """The latents (DiT: the pixels) that come out of one call."""
        generator = torch.Generator().manual_seed(seed)
        dtype, inputs = pipe.transformer.dtype, self.inputs() | more
        for name, value in inputs.items():
            inputs[name] = value.to(dtype) if torch.is_tensor(value) and torch.is_floating_point(value) else value
        return pipe(**inputs, num_inference_steps=steps, generator=generator, return_dict=False)[0]


def _make(name: str, transformer: str, scheduler: Callable[[], Any], parts: str = "", **more: Any) -> Any:
    import diffusers

    absent: dict[str, Any] = dict.fromkeys(parts.split())
    pipe = getattr(diffusers, name)(transformer=build(transformer), scheduler=scheduler(), **absent, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _ddim(name: str = "DDIMScheduler", **config: Any) -> Any:
    import diffusers

    return getattr(diffusers, name)(**config)


def _wan(two: bool) -> Any:
    second = build("WanTransformer3DModel", seed=1) if two else None
    flow = functools.partial(_flow, shift=3.0)
    return _make(
        "WanPipeline",
        "WanTransformer3DModel",
        flow,
        "tokenizer text_encoder vae",
        transformer_2=second,
        boundary_ratio=0.7 if two else None,
    )


def _dit() -> Any:
    import diffusers

    entry = ZOO["DiTTransformer2DModel"]["init"]
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**entry | {"num_embeds_ada_norm": 1000})
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    for part in (model, vae):
        part.eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    pipe = diffusers.DiTPipeline(model, vae, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _latents(size: int = 64, **more: Any) -> dict[str, Any]:
    return {"height": size, "width": size, "output_type": "latent", **more}


def _prompts(
    *shape: int, masks: bool = False, pooled: int | None = None, suffix: str = "attention_mask"
) -> dict[str, Any]:
    """Embeddings of a prompt and of a negative one."""
    given: dict[str, Any] = {"prompt_embeds": _noise(1, *shape), "negative_prompt_embeds": _noise(1, *shape, seed=1)}
    if masks:
        for sign in ("", "negative_"):
            given[f"{sign}prompt_{suffix}"] = torch.ones(1, shape[0], dtype=torch.long)
    if pooled is not None:
        given |= {
            "pooled_prompt_embeds": _noise(1, pooled, seed=2),
            "negative_pooled_prompt_embeds": _noise(1, pooled, seed=3),
        }
    return given


TWO_CALLS = {"calls": 2, "contexts": ("cond", "uncond")}
PIPELINES: dict[str, Case] = {
    "Flux": Case(
        lambda: _make("FluxPipeline", "FluxTransformer2DModel", _flow,
                      "vae text_encoder tokenizer text_encoder_2 tokenizer_2"),
        lambda: _latents(**_prompts(6, 32, pooled=32), true_cfg_scale=2.0), latents="BSC", grid=(4, 4), **TWO_CALLS,
    ),
    "CogVideoX": Case(
        lambda: _make("CogVideoXPipeline", "CogVideoXTransformer3DModel",
                      functools.partial(_ddim, "CogVideoXDDIMScheduler"), "tokenizer text_encoder vae"),
        lambda: _latents(**_prompts(8, 8), num_frames=5), contexts=("cond_uncond",), latents="BFCHW",
    ),
    "Wan": Case(lambda: _wan(two=False), lambda: _latents(**_prompts(12, 16), num_frames=5), latents="BCFHW",
                **TWO_CALLS),
    "Latte": Case(
        lambda: _make("LattePipeline", "LatteTransformer3DModel", _ddim, "tokenizer text_encoder vae"),
        lambda: _latents(**_prompts(8, 8), negative_prompt=None, video_length=16, mask_feature=False,
                         guidance_scale=2.0), latents="BCFHW",
    ),
    "PixArt": Case(
        lambda: _make("PixArtAlphaPipeline", "PixArtTransformer2DModel",
                      functools.partial(_ddim, "DPMSolverMultistepScheduler"), "tokenizer text_encoder vae"),
        lambda: _latents(**_prompts(8, 8, masks=True), negative_prompt=None, use_resolution_binning=False),
        latents="BCHW",
    ),
    "SD3": Case(
        lambda: _make("StableDiffusion3Pipeline", "SD3Transformer2DModel", _flow,
                      "vae text_encoder tokenizer text_encoder_2 tokenizer_2 text_encoder_3 tokenizer_3"),
        lambda: _latents(**_prompts(9, 32, pooled=64)), latents="BCHW",
    ),
    "HunyuanVideo": Case(
        lambda: _make("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", _flow,
                      "vae text_encoder tokenizer text_encoder_2 tokenizer_2"),
        lambda: _latents(**_prompts(12, 16, masks=True, pooled=8), num_frames=5, true_cfg_scale=2.0), latents="BCFHW",
        **TWO_CALLS,
    ),
    "LTX": Case(
        lambda: _make("LTXPipeline", "LTXVideoTransformer3DModel", _flow, "vae text_encoder tokenizer"),
        lambda: _latents(128, **_prompts(16, 16, masks=True), num_frames=9), contexts=("cond_uncond",), latents="BSC",
        grid=(2, 4, 4),
    ),
    "DiT": Case(_dit, lambda: {"class_labels": [3], "output_type": "pt"}, latents="BCHW", unconditional_first=False),
    "QwenImage": Case(
        lambda: _make("QwenImagePipeline", "QwenImageTransformer2DModel", _flow, "vae text_encoder tokenizer"),
        lambda: _latents(**_prompts(8, 16, masks=True, suffix="embeds_mask"), true_cfg_scale=2.0), latents="BSC",
        grid=(4, 4), **TWO_CALLS,
    ),
}  # fmt: skip
WAN_22 = Case(lambda: _wan(two=True), PIPELINES["Wan"].inputs, **TWO_CALLS)


def _flux_controlnet() -> Any:
    import diffusers

    sizes = dict(ZOO["FluxTransformer2DModel"]["init"])
    torch.manual_seed(2)
    net = diffusers.FluxControlNetModel(**sizes).eval().requires_grad_(False)
    for parameter in net.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=1, shift_factor=0.0)
    return _make(
        "FluxControlNetPipeline",
        "FluxTransformer2DModel",
        _flow,
        "text_encoder tokenizer text_encoder_2 tokenizer_2",
        controlnet=net,
        vae=vae,
    )


FLUX_CONTROLNET = Case(
    _flux_controlnet,
    lambda: {
        **_prompts(6, 32, pooled=32),
        "height": 16,
        "width": 16,
        "output_type": "latent",
        "control_image": _noise(1, 3, 16, 16, seed=4),
    },
)
