"""Other libraries' adaptive caches as oracles: diffusers' hooks and cache-dit's DBCache, one step at a time.

Each either runs a model of the zoo or raises :class:`NoPeer`, found out by running it (three steps, two predicted).
Whether a step was computed is seen from inside a middle block, never worked out.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
from collections.abc import Callable
from typing import Any

import torch
from residuals import Block, NoPeer, Peer, blocks_of, mixed, mixed_threshold, reference, relative_l1, reuse
from zoo import build, clock_of, inputs_of, timestep_scale, trajectory

__all__ = [
    "WITHOUT",
    "NoPeer",
    "Peer",
    "db_cache",
    "first_block_cache",
    "mag_cache",
    "mixed",
    "mixed_threshold",
    "reference",
    "reuse",
    "sea_cache",
    "vision_of",
]

# Why a model has no peer. A peer that stops to run a model is a failure, so that no oracle vanishes unseen.
NO_LIST = {"HiDreamImageTransformer2DModel", "UVit2DModel"}
BETWEEN = {"LatteTransformer3DModel"}  # its lists take turns, on tensors rearranged in between
UNREGISTERED = {"AllegroTransformer3DModel", "HunyuanDiT2DModel", "HunyuanVideo15Transformer3DModel",
                "Lumina2Transformer2DModel", "OmniGenTransformer2DModel", "SanaTransformer2DModel"}  # fmt: skip
OTHER_NAME = {"ZImageTransformer2DModel"}  # the registry does not know what its blocks call their input
FUSED = {"Flux2Transformer2DModel"}  # its last blocks return one stream, its first ones two
NO_TEXT = {"SD3Transformer2DModel", "SD3Transformer2DModel:SD35"}  # its last block returns None beside a tensor
WITHOUT = {
    "reference": NO_LIST | BETWEEN,
    "first block": NO_LIST | BETWEEN | UNREGISTERED | OTHER_NAME | FUSED | NO_TEXT,
    "mag": NO_LIST | BETWEEN | UNREGISTERED | OTHER_NAME,
    "sea": NO_LIST | BETWEEN | UNREGISTERED | OTHER_NAME | FUSED | NO_TEXT,
    "db": NO_LIST | BETWEEN | FUSED,
}


Apply = Callable[[torch.nn.Module], None]


class _Watched(Peer):
    """A peer whose last middle block is watched from inside."""

    def __init__(self, model: torch.nn.Module, watched: Block) -> None:
        super().__init__(model)
        self._ran, self._distance = False, None
        watched.leaf.register_forward_pre_hook(self._saw)

    def _saw(self, module: torch.nn.Module, args: Any) -> None:
        self._ran = True

    def _begin(self, call: dict[str, Any]) -> None:
        self._ran, self._distance = False, None

    def _seen(self) -> tuple[bool, float | None]:
        return self._ran, self._distance

    _distance: float | None


class Hooks(_Watched):
    """diffusers' hooks, in one cache context."""

    def __init__(self, model: torch.nn.Module, apply: Apply, watched: Block) -> None:
        from diffusers.hooks import HookRegistry

        super().__init__(model, watched)
        apply(model)
        self._registry = HookRegistry.check_if_exists_or_initialize(model)

    def _hook(self, kind: type) -> Any:
        """The one hook of a class, on whichever block it is."""
        return next(
            hook
            for module in self.model.modules()
            for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values()
            if isinstance(hook, kind)
        )

    def _context(self, call: dict[str, Any]) -> dict[str, Any]:
        """What the pipeline would say of this step beside the context's name."""
        return {}

    def _begin(self, call: dict[str, Any]) -> None:
        from diffusers.hooks.hooks import CacheContext, _set_cache_context

        super()._begin(call)
        _set_cache_context(self.model, CacheContext("run", **self._context(call)))

    def reset(self) -> None:
        super().reset()
        self._registry.reset_stateful_hooks(recurse=True)


class FirstBlock(Hooks):
    def __init__(self, model: torch.nn.Module, apply: Apply, watched: Block) -> None:
        from diffusers.hooks.first_block_cache import FBCHeadBlockHook

        super().__init__(model, apply, watched)
        hook = self._hook(FBCHeadBlockHook)
        decide = hook._should_compute_remaining_blocks

        def tapped(residual: torch.Tensor) -> bool:
            kept = hook.state_manager.get_state().head_block_residual
            self._distance = None if kept is None else relative_l1(residual, kept)
            return decide(residual)

        hook._should_compute_remaining_blocks = tapped


class Mag(Hooks):
    """``ratios``: those measured so far in this run, where the config says to calibrate."""

    def __init__(self, model: torch.nn.Module, apply: Apply, watched: Block) -> None:
        from diffusers.hooks.mag_cache import MagCacheBlockHook

        super().__init__(model, apply, watched)
        self.ratios: list[float] = []
        for module in model.modules():
            for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
                if isinstance(hook, MagCacheBlockHook) and hook.is_tail:
                    hook._perform_calibration_step = self._tap(hook._perform_calibration_step)

    def _tap(self, measure: Callable[..., None]) -> Callable[..., None]:
        def tapped(state: Any, residual: torch.Tensor) -> None:
            measure(state, residual)
            self.ratios.append(state.calibration_ratios[-1])

        return tapped

    def __call__(self, **call: Any) -> torch.Tensor:
        with contextlib.redirect_stdout(io.StringIO()):  # a calibration prints its ratios at its end
            return super().__call__(**call)

    def reset(self) -> None:
        super().reset()
        self.ratios = []


class Sea(Hooks):
    """``distances``: of this step's indicator to the step before's, computed or not, as the hook kept both."""

    def __init__(self, model: torch.nn.Module, apply: Apply, watched: Block, name: str, steps: int) -> None:
        from diffusers.hooks.sea_cache import SeaCacheRootHook

        super().__init__(model, apply, watched)
        self._states = self._hook(SeaCacheRootHook).state_manager
        self._name, self._steps = name, steps
        self._before: list[torch.Tensor] | None = None

    def _context(self, call: dict[str, Any]) -> dict[str, Any]:
        clock = clock_of(self._name)
        timestep = float(call[clock].flatten()[0]) * timestep_scale(self._name) if clock else 0.0
        return {"step_index": len(self.computed), "sigma": timestep / 1000.0, "num_inference_steps": self._steps}

    def _begin(self, call: dict[str, Any]) -> None:
        super()._begin(call)
        self._before = self._states.get_state().previous_indicator

    def _seen(self) -> tuple[bool, float | None]:
        after = self._states.get_state().previous_indicator
        distance = None
        if self._before is not None and after is not None and self._before is not after:
            parts = [relative_l1(b, a) for a, b in zip(self._before, after, strict=True)]
            distance = sum(parts) / len(parts)
        return self._ran, distance


class DB(_Watched):
    """cache-dit's DBCache in one context: its own adapter's lists of blocks, as one list."""

    def __init__(self, model: torch.nn.Module, fields: dict[str, Any], order: int | None, watched: Block) -> None:
        import cache_dit

        for logger in [name for name in logging.root.manager.loggerDict if name.startswith("cache_dit")]:
            logging.getLogger(logger).setLevel(logging.ERROR)  # each of its modules logs by itself
        super().__init__(model, watched)
        # The context belongs to this run alone: Wan's adapter would take every second call for the unconditional one.
        config = cache_dit.DBCacheConfig(**{"enable_separate_cfg": False, **fields})
        self._configs: dict[str, Any] = {"cache_config": config}
        if order is not None:
            # Where the last middle block returns no text (SD3), the text's calibrator fails: it has seen nothing.
            whole = all(isinstance(out, torch.Tensor) for out in watched.outputs)
            self._configs["calibrator_config"] = cache_dit.TaylorSeerCalibratorConfig(
                taylorseer_order=order, enable_encoder_calibrator=whole
            )
        cache_dit.enable_cache(_adapter(model), **copy.deepcopy(self._configs))

    def _seen(self) -> tuple[bool, float | None]:
        (name,) = self.model._context_names
        context = self.model._context_manager.get_context(name)
        distance = context.residual_diffs.get(str(context.get_current_step()))
        return self._ran, None if distance is None or distance < 0 else distance  # negative: a code, nothing measured

    def reset(self) -> None:
        import cache_dit

        super().reset()
        cache_dit.refresh_context(self.model, **copy.deepcopy(self._configs))


# Transformers that cache-dit knows under their pipeline's name only (or under the name of a sibling).
_PATTERNS = {"SD3Transformer2DModel": "Pattern_1", "HunyuanVideoFramepackTransformer3DModel": "Pattern_0"}


def _adapter(model: torch.nn.Module) -> Any:
    from cache_dit import BlockAdapter, ForwardPattern
    from cache_dit.caching.block_adapters import BlockAdapterRegister

    class_name = type(model).__name__
    if class_name in _PATTERNS:
        lists = [
            getattr(model, name) for name in ("transformer_blocks", "single_transformer_blocks") if hasattr(model, name)
        ]
        patterns, patch = [ForwardPattern[_PATTERNS[class_name]]] * len(lists), None
    else:
        if not BlockAdapterRegister.is_supported(model):
            raise NoPeer("not in cache-dit's registry")
        theirs: Any = BlockAdapterRegister.get_adapter(model)
        lists = theirs.blocks if isinstance(theirs.blocks, list) else [theirs.blocks]
        patterns, patch = theirs.forward_pattern, theirs.patch_functor
        patterns = patterns if isinstance(patterns, list) else [patterns]
        if len(lists) == 1:
            return theirs
    if len(set(patterns)) > 1:
        raise NoPeer(f"{len(lists)} lists of blocks of different kinds: each has a cache and decisions of its own")
    # Its own adapter would cache each list for itself; as one list they decide once, as everybody else does.
    names = [next(n for n, child in model.named_children() if child is blocks) for blocks in lists]
    joined = torch.nn.ModuleList(block for blocks in lists for block in blocks)
    return BlockAdapter(
        transformer=model,
        blocks=joined,
        blocks_name=names[0],
        dummy_blocks_names=names[1:],
        forward_pattern=patterns[0],
        check_num_outputs=False,
        patch_functor=patch if len(lists) == 1 else None,
    )


Make = Callable[[], Peer]


def _checked(method: str, name: str, layers: int | None, greedy: Make) -> None:
    """Raise :class:`NoPeer` unless ``greedy``, which predicts wherever it may, computes, predicts and predicts."""
    reason = _reason(method, name, layers, greedy)
    if reason is not None:
        raise NoPeer(reason)


_REASONS: dict[Any, str | None] = {}


def _reason(method: str, name: str, layers: int | None, greedy: Make) -> str | None:
    key = (method, name, layers)
    if key not in _REASONS:
        _REASONS[key] = _tried(name, greedy)
    return _REASONS[key]


def _tried(name: str, greedy: Make) -> str | None:
    try:
        peer = greedy()
    except NoPeer as error:
        return str(error)
    except Exception as error:  # whatever the other library raises
        return f"is refused: {type(error).__name__}: {error}"
    try:
        for _, call in trajectory(name, 3):
            peer(**call)
    except Exception as error:
        return f"fails at step {len(peer.computed)}: {type(error).__name__}: {error}"
    return None if peer.computed == [True, False, False] else f"computes {peer.computed} where it could predict"


def _parts(name: str, layers: int | None, first: int, last: int) -> tuple[torch.nn.Module, Block]:
    """A model and the last of its middle blocks."""
    model = build(name, layers=layers)
    blocks = blocks_of(model, inputs_of(name))
    if first + last >= len(blocks):
        raise NoPeer(f"of {len(blocks)} blocks none is left between the first {first} and the last {last}")
    return model, blocks[len(blocks) - last - 1]


def first_block_cache(name: str, threshold: float, *, layers: int | None = None) -> FirstBlock:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    def make(threshold: float) -> FirstBlock:
        model, watched = _parts(name, layers, 1, 0)
        config = FirstBlockCacheConfig(threshold=threshold)
        return FirstBlock(model, lambda model: apply_first_block_cache(model, config), watched)

    _checked("first block", name, layers, functools.partial(make, 1e9))
    return make(threshold)


def mag_cache(name: str, *, layers: int | None = None, **fields: Any) -> Mag:
    """``fields``: of MagCacheConfig; it begins a new run by itself after ``num_inference_steps``, too."""
    from diffusers.hooks.mag_cache import MagCacheConfig, apply_mag_cache

    def make(**fields: Any) -> Mag:
        model, watched = _parts(name, layers, 0, 0)
        config = MagCacheConfig(**fields)
        return Mag(model, lambda model: apply_mag_cache(model, config), watched)

    _checked(
        "mag",
        name,
        layers,
        functools.partial(
            make, threshold=1e9, max_skip_steps=100, retention_ratio=0.0, num_inference_steps=100, mag_ratios=[1.0, 1.0]
        ),
    )
    return make(**fields)


def vision_of(call: dict[str, Any]) -> list[torch.Tensor]:
    """SeaCache's raw vision of any model's call: the latents, one ``(C, T, H, W)`` per item of the batch."""
    latents = call["hidden_states"] if "hidden_states" in call else call["x"]
    if isinstance(latents, list):
        return list(latents)
    if latents.ndim == 5:
        return list(latents.unbind())
    if latents.ndim == 4:  # images: one frame
        return list(latents.unsqueeze(2).unbind())
    return list(latents.transpose(1, 2)[:, :, None, None].unbind())  # tokens: one line of one frame


def sea_cache(name: str, *, steps: int = 9, layers: int | None = None, vision: bool = False, **fields: Any) -> Sea:
    """``fields``: of SeaCacheConfig; ``steps``: of a run. Sigma is the call's timestep, as :func:`trajectory` counts.

    ``vision``: with :func:`vision_of` where diffusers knows the latents by itself (Wan), too.
    """
    from diffusers import WanTransformer3DModel
    from diffusers.hooks.sea_cache import SeaCacheConfig, apply_sea_cache

    def make(steps: int, **fields: Any) -> Sea:
        model, watched = _parts(name, layers, 0, 0)
        if vision or not isinstance(model, WanTransformer3DModel):
            fields = {"raw_vision_callback": lambda _, __, call: vision_of(call), **fields}
        config = SeaCacheConfig(**fields)
        return Sea(model, lambda model: apply_sea_cache(model, config), watched, name, steps)

    _checked(
        "sea",
        name,
        layers,
        functools.partial(make, 9, threshold=1e9, retention_steps=0, cache_end_steps=0, max_consecutive_cached=0),
    )
    return make(steps, **fields)


def db_cache(
    name: str, config_fields: dict[str, Any], taylor_order: int | None = None, *, layers: int | None = None
) -> DB:
    """``config_fields``: of DBCacheConfig; unless they say otherwise one first block, no last one, one warm-up step."""
    import cache_dit  # noqa: F401 (missing, it is no reason of a model's)

    defaults = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 1}

    def make(fields: dict[str, Any]) -> DB:
        fields = {**defaults, **fields}
        model, watched = _parts(name, layers, fields["Fn_compute_blocks"], fields["Bn_compute_blocks"])
        return DB(model, fields, taylor_order, watched)

    greedy = {key: config_fields[key] for key in ("Fn_compute_blocks", "Bn_compute_blocks") if key in config_fields}
    method = f"db {sorted(greedy.items())} {taylor_order}"
    _checked(method, name, layers, functools.partial(make, {**greedy, "residual_diff_threshold": 2.0}))
    return make(config_fields)
