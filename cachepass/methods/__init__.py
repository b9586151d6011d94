"""The caching methods: config -> cuts, forecasts and schedules. Host code only.

A method of your own: a config class with ``cachepass.config.cache_config`` and a ``Method`` with
``implements``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ..config import (
    CacheConfig,
    DBCacheConfig,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    InvariantConfig,
    MagCacheConfig,
    MethodConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TeaCacheConfig,
)
from ..errors import ConfigError
from ..recipe.schedule import Step
from .base import (
    PLAIN,
    PLAIN_HALF,
    WHOLE,
    GroupHistory,
    Guidance,
    Method,
    Probe,
    Region,
    Route,
    Selection,
    Skip,
    Target,
    span_of,
)
from .fastercache import FasterCache
from .invariant import Invariant
from .pab import PyramidAttentionBroadcast
from .scheduled import Scheduled
from .taylorseer import TaylorSeer

_M = TypeVar("_M", bound=Method)

_IMPLEMENTATIONS: dict[type[MethodConfig], Callable[[Any], Method]] = {
    TaylorSeerCacheConfig: TaylorSeer,
    FasterCacheConfig: FasterCache,
    InvariantConfig: Invariant,
    PyramidAttentionBroadcastConfig: PyramidAttentionBroadcast,
    **dict.fromkeys((CacheConfig, FirstBlockCacheConfig, MagCacheConfig, SeaCacheConfig, TeaCacheConfig, DBCacheConfig),
                    Scheduled),
}  # fmt: skip


def implements(config: type[MethodConfig]) -> Callable[[type[_M]], type[_M]]:
    """Class decorator: the method that a config class configures. It is made with the config.

    Raises:
        ConfigError: ``config`` was not made a method's config by ``cache_config``, or has a method.
    """
    if not (isinstance(config, type) and issubclass(config, MethodConfig) and config.method):
        raise ConfigError(f"{config!r} is no method's config", where="implements",
                          hint="decorate its class with cache_config(name)")  # fmt: skip
    if config in _IMPLEMENTATIONS:
        raise ConfigError(f"{config.__name__} has a method already", where="implements")

    def register(method: type[_M]) -> type[_M]:
        _IMPLEMENTATIONS[config] = method
        return method

    return register


def make_method(config: MethodConfig) -> Method:
    """The method that a config configures.

    Raises:
        ConfigError: There is none.
    """
    make = _IMPLEMENTATIONS.get(type(config))
    if make is None:
        raise ConfigError("no method implements it", where=type(config).__name__,
                          hint=f"decorate a Method with implements({type(config).__name__})")  # fmt: skip
    return make(config)


__all__ = [
    "PLAIN",
    "PLAIN_HALF",
    "WHOLE",
    "GroupHistory",
    "Guidance",
    "Method",
    "Probe",
    "Region",
    "Route",
    "Selection",
    "Skip",
    "Step",
    "Target",
    "implements",
    "make_method",
    "span_of",
]
