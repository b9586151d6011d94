"""Pipelines of diffusers that call their transformer several times per step in no context (find_multi_call.py), tiny.

:class:`Told` is their reference: diffusers' own TaylorSeer hooks, which know no call from another, told every call's
place in its step.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pipelines import FLUX_CONTROLNET, PIPELINES, Case, _flow, _latents, _make, _noise, _prompts
from zoo import build


def tiny_vae() -> Any:
    """As many channels in its latents as the tiny FLUX takes."""
    import diffusers

    torch.manual_seed(3)
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=1, shift_factor=0.0)
    return vae.eval().requires_grad_(False)


def _image_to_image() -> Any:
    return _make(
        "FluxImg2ImgPipeline",
        "FluxTransformer2DModel",
        _flow,
        "text_encoder tokenizer text_encoder_2 tokenizer_2",
        vae=tiny_vae(),
    )


def image_inputs() -> dict[str, Any]:
    """Of FLUX's image to image."""
    image = _noise(1, 3, 16, 16, seed=4).sigmoid()
    return _latents(16, **_prompts(6, 32, pooled=32), image=image, strength=0.9)


def _video_to_video() -> Any:
    flow = functools.partial(_flow, shift=3.0)
    return _make("WanVideoToVideoPipeline", "WanTransformer3DModel", flow, "tokenizer text_encoder vae")


class Modular(Case):
    """A modular pipeline, from embeddings to latents."""

    def run(self, pipe: Any, steps: int, seed: int = 0, **more: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return pipe(**self.inputs() | more, num_inference_steps=steps, generator=generator, output="latents")


def _modular(guider: str, **config: Any) -> Any:
    import diffusers
    from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage import QwenImageCoreDenoiseStep

    blocks = QwenImageCoreDenoiseStep()
    pipe = blocks.init_pipeline()
    pipe.update_components(
        transformer=build("QwenImageTransformer2DModel"),
        scheduler=_flow(),
        guider=getattr(diffusers, guider)(guidance_scale=2.0, **config),
    )
    pipe.set_progress_bar_config(disable=True)
    for block in blocks.sub_blocks.values():
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)
    return pipe


def _projected() -> Any:
    return _modular("AdaptiveProjectedGuidance", eta=0.5, adaptive_projected_guidance_momentum=-0.5)


def _skipping() -> Any:
    from diffusers.hooks import LayerSkipConfig

    layers = LayerSkipConfig([1], fqn="transformer_blocks", skip_attention=False, skip_ff=True)
    return _modular("SkipLayerGuidance", skip_layer_config=layers, skip_layer_guidance_stop=1.0)


def _embeddings() -> dict[str, Any]:
    return {**_prompts(8, 16, masks=True, suffix="embeds_mask"), "height": 64, "width": 64}


def shorter(inputs: Callable[[], dict[str, Any]], by: int) -> Callable[[], dict[str, Any]]:
    """Inputs whose negative prompt has so many tokens less."""

    def shortened() -> dict[str, Any]:
        given = inputs()
        names = [name for name in given if name.startswith("negative_prompt")]
        return given | {name: given[name][:, :-by] for name in names}

    return shortened


@dataclass(frozen=True)
class Silent:
    """A pipeline, and what is particular to it.

    Attributes:
        case: With ``calls`` per step, at most.
        contexts: As summaries call them.
    """

    case: Case
    contexts: tuple[str, ...] = ("default", "call 2")


SILENT: dict[str, Silent] = {
    "FluxImg2Img": Silent(Case(_image_to_image, lambda: image_inputs() | {"true_cfg_scale": 2.0}, calls=2)),
    "FluxControlNet": Silent(Case(FLUX_CONTROLNET.make, lambda: FLUX_CONTROLNET.inputs() | {"true_cfg_scale": 2.0},
                                  calls=2)),
    "WanVideoToVideo": Silent(Case(_video_to_video, lambda: _latents(latents=_noise(1, 4, 2, 8, 8, seed=5),
                                                                     **_prompts(12, 16)), calls=2)),
    # One call for both halves of guidance, one without some layers, in the middle of the run.
    "SD3 that skips layers": Silent(Case(
        PIPELINES["SD3"].make, lambda: PIPELINES["SD3"].inputs() | {"skip_guidance_layers": [0],
        "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.9}, calls=2)),
    "QwenImage, guidance": Silent(Modular(lambda: _modular("ClassifierFreeGuidance"), _embeddings, calls=2)),
    "QwenImage, projected": Silent(Modular(_projected, _embeddings, calls=2)),
    "QwenImage, skipped layers": Silent(Modular(_skipping, _embeddings, calls=3),
                                        contexts=("default", "call 2", "call 3")),
}  # fmt: skip


class Told:
    """A pipeline under diffusers' TaylorSeer hooks.

    ``silent``: the pipeline tells them nothing, so each call's place in its step is told here.
    """

    def __init__(self, pipe: Any, fields: dict[str, Any], *, silent: bool) -> None:
        import diffusers
        from diffusers.hooks import HookRegistry, apply_taylorseer_cache

        self.pipe, self._silent = pipe, silent
        self._last: float | None = None
        self._place = 0
        self.calls: Counter[int] = Counter()  # of this run, by place
        pipe.transformer.register_forward_pre_hook(self._tell, with_kwargs=True)
        if silent:
            pipe.transformer.register_forward_hook(lambda module, *_: self._say(module, None), always_call=True)
        apply_taylorseer_cache(pipe.transformer, diffusers.TaylorSeerCacheConfig(**fields))
        self._registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)

    def _tell(self, module: Any, _: Any, given: dict[str, Any]) -> None:
        from diffusers.hooks.hooks import CacheContext

        now = float(given["timestep"].flatten()[0])
        self._place = self._place + 1 if now == self._last else 0
        self._last = now
        self.calls[self._place] += 1
        if self._silent:
            self._say(module, CacheContext(f"call {self._place}"))

    @staticmethod
    def _say(module: Any, context: Any) -> None:
        """Not left open: what is said in a thread is heard of every model."""
        from diffusers.hooks.hooks import _set_cache_context

        _set_cache_context(module, context)

    def end(self) -> None:
        """The next call is the first of a run."""
        self._registry.reset_stateful_hooks(recurse=True)
        self._last = None
        self.calls.clear()
