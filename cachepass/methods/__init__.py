"""The caching methods: config -> cuts, forecasts and schedules. Host code only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..config import (
    CacheConfig,
    FasterCacheConfig,
    InvariantConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from .base import PLAIN, PLAIN_HALF, WHOLE, GroupHistory, Guidance, Method, Region, Route, Selection, Skip, Step, Target
from .fastercache import FasterCache
from .invariant import Invariant
from .pab import PyramidAttentionBroadcast
from .taylorseer import TaylorSeer

_IMPLEMENTATIONS: dict[type[CacheConfig], Callable[[Any], Method]] = {
    TaylorSeerCacheConfig: TaylorSeer,
    FasterCacheConfig: FasterCache,
    InvariantConfig: Invariant,
    PyramidAttentionBroadcastConfig: PyramidAttentionBroadcast,
}


def make_method(config: CacheConfig) -> Method:
    """The method that a config configures."""
    return _IMPLEMENTATIONS[type(config)](config)


__all__ = [
    "PLAIN",
    "PLAIN_HALF",
    "WHOLE",
    "GroupHistory",
    "Guidance",
    "Method",
    "Region",
    "Route",
    "Selection",
    "Skip",
    "Step",
    "Target",
    "make_method",
]
