"""What the user says about a method: one config class for each."""

from .adaptive import (
    FLUX_MAG_RATIOS,
    CacheConfig,
    DBCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    SeaCacheConfig,
    TeaCacheConfig,
)
from .base import MethodConfig, cache_config, method_names, parse_cache
from .fixed import InvariantConfig, TaylorSeerCacheConfig
from .kinds import ATTENTION_KINDS, TENSOR_FORMATS, FasterCacheConfig, PyramidAttentionBroadcastConfig
from .tuned import Origin, TunedConfig

__all__ = [
    "ATTENTION_KINDS",
    "FLUX_MAG_RATIOS",
    "TENSOR_FORMATS",
    "CacheConfig",
    "DBCacheConfig",
    "FasterCacheConfig",
    "FirstBlockCacheConfig",
    "InvariantConfig",
    "MagCacheConfig",
    "MethodConfig",
    "Origin",
    "PyramidAttentionBroadcastConfig",
    "SeaCacheConfig",
    "TaylorSeerCacheConfig",
    "TeaCacheConfig",
    "TunedConfig",
    "cache_config",
    "method_names",
    "parse_cache",
]
