"""Pyramid Attention Broadcast (https://arxiv.org/abs/2408.12588), with the semantics of diffusers' hook."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Sequence

from ..config import ATTENTION_KINDS, PyramidAttentionBroadcastConfig
from ..errors import CachepassWarning
from ..forecast import REUSE
from .base import Method, Region, Selection, Skip, Step, Target, no_match

_KINDS = (*ATTENTION_KINDS, "mlp")


class PyramidAttentionBroadcast(Method):
    """Reuse the last output of an attention (or feed-forward) for some steps; one group per kind."""

    needs_timestep = True

    def __init__(self, config: PyramidAttentionBroadcastConfig) -> None:
        if all(config.kind(kind)[0] is None for kind in _KINDS):
            warnings.warn(
                "PyramidAttentionBroadcastConfig: no skip range is given; using spatial_attention_block_skip_range=2",
                CachepassWarning, stacklevel=2,
            )  # fmt: skip
            config = dataclasses.replace(config, spatial_attention_block_skip_range=2)  # pyright: ignore
        self.config = config
        self.kinds = tuple(kind for kind in _KINDS if config.kind(kind)[0] is not None)

    def select(self, regions: Sequence[Region]) -> Selection:
        targets, skips = [], []
        for region in regions:
            if not (region.is_attention or region.is_mlp):
                continue
            kind = self._kind(region)
            if kind is None:
                skips.append(Skip(region.id, f"{region.kind}: no kind with a skip range has an identifier for it"))
            else:
                targets.append(Target(region, kind, REUSE))
        self._require(targets, regions)
        return Selection(tuple(targets), tuple(skips))

    def _kind(self, region: Region) -> str | None:
        """The first kind, in diffusers' order, that is switched on, fits the region and has an identifier for it."""
        for kind in self.kinds:
            fits = region.is_mlp if kind == "mlp" else region.is_attention and region.is_cross == (kind == "cross")
            if fits and any(re.search(p, region.path) for p in self.config.kind(kind)[2]):
                return kind
        return None

    def _require(self, targets: Sequence[Target], regions: Sequence[Region]) -> None:
        reached = {target.group for target in targets}
        for kind in self.kinds:
            if kind in reached:
                continue
            if kind == "mlp":
                candidates = [r.path for r in regions if r.is_mlp]
            else:
                candidates = [r.path for r in regions if r.is_attention and r.is_cross == (kind == "cross")]
            prefix = "mlp" if kind == "mlp" else f"{kind}_attention"
            default = getattr(PyramidAttentionBroadcastConfig, f"{prefix}_block_identifiers")
            identifiers = self.config.kind(kind)[2]
            if not reached or tuple(identifiers) != tuple(default):
                where = f"{type(self.config).__name__}.{prefix}_block_identifiers"
                raise no_match(where, identifiers, candidates, f"{kind} ")
            warnings.warn(
                f"PyramidAttentionBroadcastConfig.{prefix}_block_skip_range has no effect: the model has no {kind} "
                f"module that the identifiers match", CachepassWarning, stacklevel=2,
            )  # fmt: skip

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
        ranges = ", ".join(f"{kind} {self.config.kind(kind)[1]}" for kind in self.kinds)
        seen = f"{timesteps[0]:g} to {timesteps[1]:g}" if timesteps else "none"
        return (
            f"no step that could be skipped had a timestep within its range ({ranges}); timesteps seen: {seen}. "
            'Where the model\'s input is scaled (1 to 0 instead of 1000 to 0) give options["timestep_scale"]=1000'
        )
