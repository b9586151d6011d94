"""Pyramid Attention Broadcast (https://arxiv.org/abs/2408.12588), with the semantics of diffusers' hook."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..config import ATTENTION_KINDS, PyramidAttentionBroadcastConfig
from ..errors import warn
from ..recipe.forecast import REUSE
from .base import Method, Region, Selection, Skip, Step, Target
from .kinds import describe_ranges, kind_of, out_of_range, require_kinds

_KINDS = (*ATTENTION_KINDS, "mlp")


class PyramidAttentionBroadcast(Method):
    """Reuse the last output of an attention (or feed-forward) for some steps; one group per kind."""

    needs_timestep = True

    def __init__(self, config: PyramidAttentionBroadcastConfig) -> None:
        if all(config.kind(kind)[0] is None for kind in _KINDS):
            warn("PyramidAttentionBroadcastConfig: no skip range is given; using spatial_attention_block_skip_range=2")
            config = dataclasses.replace(config, spatial_attention_block_skip_range=2)  # pyright: ignore
        self.config = config
        self.kinds = tuple(kind for kind in _KINDS if config.kind(kind)[0] is not None)

    def select(self, regions: Sequence[Region], model: Sequence[str] | None = None) -> Selection:
        targets, skips = [], []
        for region in regions:
            if not (region.is_attention or region.is_mlp):
                continue
            kind = kind_of(region, self.kinds, self.config)
            if kind is None:
                skips.append(Skip(region.id, f"{region.kind}: no kind with a skip range has an identifier for it"))
            else:
                targets.append(Target(region, kind, REUSE))
        if model is None:
            require_kinds(self.kinds, targets, regions, self.config, at_least_one=True)
        return Selection(tuple(targets), tuple(skips))

    def predicts(self, group: str, step: Step) -> bool:
        skip_range, (low, high), _ = self.config.kind(group)
        assert skip_range is not None and step.timestep is not None, group
        return step.index > 0 and low < step.timestep < high and step.index % skip_range != 0

    def never_predicts(self, num_inference_steps: int | None) -> str | None:
        if all(self.config.kind(kind)[0] == 1 for kind in self.kinds):
            return "every skip range is 1, which computes every step"
        if num_inference_steps == 1:
            return "a run of one step has nothing to reuse"
        return None

    def why_idle(self, timesteps: tuple[float, float] | None) -> str:
        return out_of_range(describe_ranges(self.kinds, self.config), timesteps)
