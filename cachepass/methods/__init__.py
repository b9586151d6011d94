"""The caching methods: config -> cuts, forecasts and schedules. Host code only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..config import CacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from .base import GroupHistory, Method, Region, Selection, Skip, Step, Target
from .pab import PyramidAttentionBroadcast
from .taylorseer import TaylorSeer

_IMPLEMENTATIONS: dict[type[CacheConfig], Callable[[Any], Method]] = {
    TaylorSeerCacheConfig: TaylorSeer,
    PyramidAttentionBroadcastConfig: PyramidAttentionBroadcast,
}


def make_method(config: CacheConfig) -> Method:
    """The method that a config configures."""
    return _IMPLEMENTATIONS[type(config)](config)


__all__ = ["GroupHistory", "Method", "Region", "Selection", "Skip", "Step", "Target", "make_method"]
