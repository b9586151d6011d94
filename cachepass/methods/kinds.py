"""Kinds of modules with a skip range, a timestep range and identifiers each: what PAB and FasterCache share."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..config import FasterCacheConfig, PyramidAttentionBroadcastConfig
from ..errors import warn
from .base import Region, Target, no_match

KindConfig = PyramidAttentionBroadcastConfig | FasterCacheConfig


def fits(kind: str, region: Region) -> bool:
    """A region can be of a kind: ``"mlp"``, ``"cross"``, or a kind of self-attention."""
    return region.is_mlp if kind == "mlp" else region.is_attention and region.is_cross == (kind == "cross")


def kind_of(region: Region, kinds: Sequence[str], config: KindConfig) -> str | None:
    """The first of the kinds that fits the region and has an identifier for it."""
    for kind in kinds:
        if fits(kind, region) and any(region.matches(p, re.search) for p in config.kind(kind)[2]):
            return kind
    return None


def require_kinds(kinds: Sequence[str], targets: Sequence[Target], regions: Sequence[Region], config: KindConfig,
                  *, at_least_one: bool) -> None:  # fmt: skip
    """NoMatchError for identifiers of the user's that match nothing (or, if one is needed, if nothing matches at all);
    a warning for default ones."""
    reached = {target.group for target in targets}
    for kind in kinds:
        if kind in reached:
            continue
        prefix = "mlp" if kind == "mlp" else f"{kind}_attention"
        identifiers = config.kind(kind)[2]
        name = type(config).__name__
        if (at_least_one and not reached) or identifiers != tuple(getattr(type(config), f"{prefix}_block_identifiers")):
            candidates = [r.path for r in regions if fits(kind, r)]
            raise no_match(f"{name}.{prefix}_block_identifiers", identifiers, candidates, f"{kind} ")
        warn(f"{name}.{prefix}_block_skip_range has no effect: {_why_unreached(kind, identifiers, targets)}")


def _why_unreached(kind: str, identifiers: Sequence[str], targets: Sequence[Target]) -> str:
    for target in targets:
        if fits(kind, target.region) and any(target.region.matches(p, re.search) for p in identifiers):
            return (f"the {target.group} identifiers, which come first, match {target.region.path} and all others of "
                    "its modules too")  # fmt: skip
    return f"the identifiers match no {kind} module of the model"


def describe_ranges(kinds: Sequence[str], config: KindConfig) -> str:
    """The kinds' timestep ranges, for messages."""
    return ", ".join(f"{kind} {config.kind(kind)[1]}" for kind in kinds)


def out_of_range(ranges: str, timesteps: tuple[float, float] | None) -> str:
    """Why a run predicted nothing: no timestep that could be skipped lay in the ranges."""
    seen = f"{timesteps[0]:g} to {timesteps[1]:g}" if timesteps else "none"
    return (
        f"no step that could be skipped had a timestep within its range ({ranges}); timesteps seen: {seen}. "
        'Where the model\'s input is scaled (1 to 0 instead of 1000 to 0) give options["timestep_scale"]=1000'
    )
