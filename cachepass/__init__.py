"""cachepass: caching for diffusion transformers as a ``torch.compile`` backend.

compiled = torch.compile(model, backend="cached_inductor", fullgraph=True,
                         options={"cache": cachepass.TaylorSeerCacheConfig(cache_interval=5, max_order=1)})
"""

from .config import FasterCacheConfig, InvariantConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from .errors import (
    BatchError,
    CachepassError,
    CachepassWarning,
    ConcurrencyError,
    ConfigError,
    NoMatchError,
    NotCompiledError,
    OptionError,
    OutputError,
    PartialGraphError,
    TimestepError,
    TrainingError,
)
from .inspect.explain import Explanation, explain
from .inspect.summary import Summary, reset, summary
from .options import CompileOptions
from .runtime.context import cache_context
from .warmup import warmup

__version__ = "0.2.0"

__all__ = [
    "BatchError",
    "CachepassError",
    "CachepassWarning",
    "CompileOptions",
    "ConcurrencyError",
    "ConfigError",
    "Explanation",
    "FasterCacheConfig",
    "InvariantConfig",
    "NoMatchError",
    "NotCompiledError",
    "OptionError",
    "OutputError",
    "PartialGraphError",
    "PyramidAttentionBroadcastConfig",
    "Summary",
    "TaylorSeerCacheConfig",
    "TimestepError",
    "TrainingError",
    "cache_context",
    "explain",
    "reset",
    "summary",
    "warmup",
]
