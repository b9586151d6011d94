from . import cut, forecast, schedule
from .config import (
    FLUX_MAG_RATIOS,
    CacheConfig,
    DBCacheConfig,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    InvariantConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TeaCacheConfig,
    TunedConfig,
)
from .errors import (
    BatchError,
    CachepassError,
    CachepassWarning,
    CaptureError,
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
from .gpu.table import Gpu
from .inspect.compare import Compared, Comparison, compare
from .inspect.explain import Explanation, explain
from .inspect.memory import Memory, memory
from .inspect.summary import Summary, summary
from .options import CompileOptions
from .recipe.guidance import Guidance
from .recipe.recipe import Group, Part, Recipe
from .run.context import cache_context
from .run.live import recompile, reset
from .tuning.calibration import TeaCacheFit, fit_teacache, mag_ratios
from .tuning.tune import tune
from .tuning.tuning import Tuned, Tuning
from .warmup import warmup

__version__: str

__all__ = [
    "FLUX_MAG_RATIOS",
    "BatchError",
    "CacheConfig",
    "CachepassError",
    "CachepassWarning",
    "CaptureError",
    "Compared",
    "Comparison",
    "CompileOptions",
    "ConcurrencyError",
    "ConfigError",
    "DBCacheConfig",
    "Explanation",
    "FasterCacheConfig",
    "FirstBlockCacheConfig",
    "Gpu",
    "Group",
    "Guidance",
    "InvariantConfig",
    "MagCacheConfig",
    "Memory",
    "NoMatchError",
    "NotCompiledError",
    "OptionError",
    "OutputError",
    "Part",
    "PartialGraphError",
    "PyramidAttentionBroadcastConfig",
    "Recipe",
    "SeaCacheConfig",
    "Summary",
    "TaylorSeerCacheConfig",
    "TeaCacheConfig",
    "TeaCacheFit",
    "TimestepError",
    "TrainingError",
    "Tuned",
    "TunedConfig",
    "Tuning",
    "cache_context",
    "compare",
    "cut",
    "explain",
    "fit_teacache",
    "forecast",
    "mag_ratios",
    "memory",
    "recompile",
    "reset",
    "schedule",
    "summary",
    "tune",
    "warmup",
]
