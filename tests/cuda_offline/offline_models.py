"""The zoo's tiny models in bf16, as the programs of a cache, and inputs for them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from zoo import build, guided_inputs_of, inputs_of, timestep_scale

import cachepass
from cachepass.program.specialize import Variant
from cachepass.program.trace import Traced

METHODS = {
    "taylorseer": {"method": "taylorseer", "cache_interval": 3, "max_order": 1},
    "pab": {"method": "pab", "spatial_attention_block_skip_range": 2},
    "fastercache": {"method": "fastercache"},
    "first_block": {"method": "first_block_cache", "threshold": 0.12},
    "dbcache": {"method": "dbcache", "Fn_compute_blocks": 1, "Bn_compute_blocks": 0},
}
# Of what FasterCache keeps.
FORMATS = {
    "FluxTransformer2DModel": {"tensor_format": "BSC", "latent_grid": (4, 4)},
    "WanTransformer3DModel": {"tensor_format": "BCFHW"},
    "DiTTransformer2DModel": {"tensor_format": "BCHW"},
}
MODELS = ("FluxTransformer2DModel", "WanTransformer3DModel", "DiTTransformer2DModel")


def cast(value, dtype):
    """The floats of an argument, in a dtype."""
    if isinstance(value, dict):
        return {key: cast(inner, dtype) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(cast(inner, dtype) for inner in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def explained(name: str, method: str, dtype: torch.dtype = torch.bfloat16, **kwargs) -> cachepass.Explanation:
    """A tiny model with a method."""
    guided = method == "fastercache"
    inputs = cast(guided_inputs_of(name) if guided else inputs_of(name), dtype)
    options = {"timestep_scale": timestep_scale(name)}
    cache = METHODS[method] | (FORMATS[name] if guided else {})
    with torch.no_grad():
        return cachepass.explain(build(name, layers=2).to(dtype), cache=cache, options=options, **inputs, **kwargs)


def variants(explanation: cachepass.Explanation) -> Iterator[tuple[Variant, Traced]]:
    """All programs of a model, each once, with the graphs that they are made of."""
    seen = set()
    for _, variant, traced in explanation.program.all_variants():
        if variant.name not in seen:
            seen.add(variant.name)
            yield variant, traced


def values_for(variant: Variant, seed: int = 0) -> list[torch.Tensor]:
    """Random inputs of a program: weights of a size that keeps values near 1, small whole numbers."""
    generator = torch.Generator().manual_seed(seed)

    def made(like):
        if not isinstance(like, torch.Tensor):
            return like
        shape = tuple(like.shape)
        if not like.dtype.is_floating_point:
            return torch.ones(shape, dtype=like.dtype)
        value = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            value = value / max(1, shape[-1]) ** 0.5
        made = torch.empty_strided(shape, like.stride(), dtype=like.dtype)
        return made.copy_(value)

    return [made(node.meta["val"]) for node in variant.gm.graph.find_nodes(op="placeholder")]
