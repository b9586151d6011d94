"""Tiny configurations of diffusers' transformers (zoo.json), and the oracle: diffusers' own cache hooks.

Adding a model is adding its JSON: ``init`` arguments and ``inputs`` with dtype, shape and, where random numbers would
make no sense, values. ``graph_breaks`` says that Dynamo cannot trace it as one graph.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

import cachepass

Case = TypeVar("Case")
# Dynamo cannot trace the device context in which these make their rotary tables; the first call keeps the tables.
EAGER_FIRST = {"ZImageTransformer2DModel"}

ZOO: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "zoo.json").read_text())
ALL = bool(os.environ.get("CACHEPASS_ZOO"))  # every case of the sweeps, not only one of each kind
CLOCKS = ("timestep", "timesteps", "t")


def sweep_over(every: Iterable[Case], few: Iterable[Case]) -> list[Case]:
    """The cases of a sweep: a few, one of each kind, or all of them with ``CACHEPASS_ZOO=1``."""
    every, few = list(every), list(few)
    assert all(case in every for case in few), "a case that the sweep does not have"
    return every if ALL else few


def clock_of(name: str) -> str | None:
    """The name of the timestep input, if the model has one."""
    return next((clock for clock in CLOCKS if clock in ZOO[name]["inputs"]), None)


def is_one_graph(name: str) -> bool:
    return not ZOO[name].get("graph_breaks", False)


def build(name: str, seed: int = 0, *, layers: int | None = None) -> torch.nn.Module:
    """The tiny model with random weights (the same for the same seed); ``layers``: at least so many blocks a list.

    A model whose text encoder's layers are counted one by one (HiDream) keeps its own number of blocks.
    """
    import diffusers

    entry = ZOO[name]
    torch.manual_seed(seed)
    init = {
        k: tuple(v) if isinstance(v, list) and v and k != "dual_attention_layers" else v
        for k, v in entry["init"].items()
    }
    if layers is not None and "llama_layers" not in init:
        init |= {k: max(layers, init[k]) for k in ("num_layers", "num_single_layers", "n_layers") if k in init}
    model = getattr(diffusers, entry["model"])(**init).eval().requires_grad_(False)
    for parameter in model.parameters():  # zero-initialised gates would hide whatever stands behind them
        if parameter.ndim == 0 or not parameter.any():
            parameter.normal_(std=0.02)
    if name in EAGER_FIRST:
        model(**inputs_of(name))
    return model


def _tensor(spec: Any, generator: torch.Generator) -> Any:
    if isinstance(spec, dict) and "dtype" in spec:
        dtype = getattr(torch, spec["dtype"])
        if "values" in spec:
            return torch.tensor(spec["values"], dtype=dtype)
        if dtype.is_floating_point:
            return torch.randn(spec["shape"], dtype=dtype, generator=generator)
        return torch.ones(spec["shape"], dtype=dtype)
    if isinstance(spec, dict):
        return {k: _tensor(v, generator) for k, v in spec.items()}
    if isinstance(spec, list):
        if all(isinstance(v, int) for v in spec):
            return tuple(spec)  # a shape
        return [_tensor(v, generator) for v in spec]
    return spec


def inputs_of(name: str, seed: int = 1) -> dict[str, Any]:
    """Keyword arguments for one call."""
    generator = torch.Generator().manual_seed(seed)
    return {k: _tensor(v, generator) for k, v in ZOO[name]["inputs"].items()}


def guided_inputs_of(name: str, seed: int = 1) -> dict[str, Any]:
    """Keyword arguments for one call with a guidance batch: the zoo's own where it is even, else doubled."""
    base, other = inputs_of(name, seed), inputs_of(name, seed + 1)
    main = base.get("hidden_states", base.get("x"))
    if len(main) % 2 == 0:
        return base
    batched = set(cachepass.FasterCacheConfig().guided_inputs)

    def double(key: str, value: Any) -> Any:
        if key not in batched:
            return value
        return [*other[key], *value] if isinstance(value, list) else torch.cat([other[key], value])

    return {key: double(key, value) for key, value in base.items()}


def trajectory(
    name: str, steps: int, dtype: torch.dtype = torch.float32, *, guided: bool = False
) -> Iterator[tuple[float, dict[str, Any]]]:
    """``steps`` calls of a denoising run: the timestep (falling from 950) and the keyword arguments.

    The latents change smoothly with some noise; models whose timestep runs from 1 to 0 get it so.
    """
    base = guided_inputs_of(name) if guided else inputs_of(name)
    latents = next(key for key in ("hidden_states", "x", "encoder_hidden_states") if key in base)
    clock, unit = clock_of(name), timestep_scale(name)
    generator = torch.Generator().manual_seed(7)

    def cast(value: Any) -> Any:
        if isinstance(value, list):
            return [cast(v) for v in value]
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def move(value: Any, step: int) -> Any:
        if isinstance(value, list):
            return [move(v, step) for v in value]
        noise = torch.randn(value.shape, generator=generator)
        return value * (1 - 0.03 * step) + 0.05 * noise

    fixed = {key: cast(value) for key, value in base.items()}  # the same tensors in all steps, as pipelines give them
    for step in range(steps):
        timestep = 950.0 - 880.0 * step / steps
        call = dict(fixed)
        call[latents] = cast(move(base[latents], step))
        if clock is not None:
            scaled = timestep / unit if base[clock].is_floating_point() else int(timestep)
            call[clock] = torch.full_like(base[clock], scaled)
            timestep = float(call[clock].flatten()[0]) * unit
            call[clock] = cast(call[clock])
        yield timestep, call


def timestep_scale(name: str) -> float:
    """Factor from the model's timestep input to 0..1000 in :func:`trajectory`."""
    name_of_clock = clock_of(name)
    if name_of_clock is None:
        return 1.0
    clock = inputs_of(name)[name_of_clock]
    return 1000.0 if clock.is_floating_point() and float(clock.max()) <= 1.0 else 1.0


def first_tensor(result: Any) -> torch.Tensor:
    """The model's sample, whatever it is wrapped in."""
    while not isinstance(result, torch.Tensor):
        result = result[0]
    return result


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    difference = (value.double() - reference.double()).norm()
    return float(difference / reference.double().norm().clamp_min(1e-12))


class Oracle:
    """A model under diffusers' own hooks."""

    def __init__(self, model: torch.nn.Module, apply: Callable[[torch.nn.Module], None]) -> None:
        self.model = model
        apply(model)

    def hooked(self) -> list[str]:
        """Paths of the modules that carry a hook."""
        return [n for n, m in self.model.named_modules() if getattr(getattr(m, "_diffusers_hook", None), "hooks", None)]

    def __call__(self, context: str = "default", **kwargs: Any) -> torch.Tensor:
        from diffusers.hooks.hooks import CacheContext, _set_cache_context

        _set_cache_context(self.model, CacheContext(context))
        return first_tensor(self.model(**kwargs))

    def reset(self) -> None:
        from diffusers.hooks import HookRegistry

        HookRegistry.check_if_exists_or_initialize(self.model).reset_stateful_hooks(recurse=True)


def taylorseer_oracle(name: str, **fields: Any) -> Oracle:
    from diffusers import TaylorSeerCacheConfig
    from diffusers.hooks import apply_taylorseer_cache

    return Oracle(build(name), lambda model: apply_taylorseer_cache(model, TaylorSeerCacheConfig(**fields)))


def fastercache_oracle(name: str, now: list[float], **fields: Any) -> Oracle:
    """FasterCache hooks that read the timestep from ``now[0]``."""
    from diffusers import FasterCacheConfig
    from diffusers.hooks import apply_faster_cache

    config = FasterCacheConfig(current_timestep_callback=lambda: now[0], **fields)
    return Oracle(build(name), lambda model: apply_faster_cache(model, config))


def pab_oracle(name: str, now: list[float], **fields: Any) -> Oracle:
    """PAB hooks that read the timestep from ``now[0]``."""
    from diffusers import PyramidAttentionBroadcastConfig
    from diffusers.hooks import apply_pyramid_attention_broadcast

    config = PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: now[0], **fields)
    return Oracle(build(name), lambda model: apply_pyramid_attention_broadcast(model, config))


@contextlib.contextmanager
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            yield
    finally:
        torch._dynamo.reset()
