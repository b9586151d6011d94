from . import cut, forecast, schedule, serving
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
    ArchiveError,
    BatchError,
    CachepassError,
    CachepassWarning,
    CaptureError,
    ConcurrencyError,
    ConfigError,
    ExportError,
    NoMatchError,
    NotCompiledError,
    OptionError,
    OutputError,
    PartialGraphError,
    PoolError,
    RowsError,
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
from .run.live import recompile, release, reset
from .run.rows.called import rows
from .ship.apply import apply
from .ship.export import Exported, export
from .ship.load import load
from .ship.model import LoadedModel
from .tuning.calibration import TeaCacheFit, fit_teacache, mag_ratios
from .tuning.tune import tune
from .tuning.tuning import Tuned, Tuning
from .warmup import warmup

__version__: str

__all__ = [
    "FLUX_MAG_RATIOS",
    "ArchiveError",
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
    "ExportError",
    "Exported",
    "FasterCacheConfig",
    "FirstBlockCacheConfig",
    "Gpu",
    "Group",
    "Guidance",
    "InvariantConfig",
    "LoadedModel",
    "MagCacheConfig",
    "Memory",
    "NoMatchError",
    "NotCompiledError",
    "OptionError",
    "OutputError",
    "Part",
    "PartialGraphError",
    "PoolError",
    "PyramidAttentionBroadcastConfig",
    "Recipe",
    "RowsError",
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
    "apply",
    "cache_context",
    "compare",
    "cut",
    "explain",
    "export",
    "fit_teacache",
    "forecast",
    "load",
    "mag_ratios",
    "memory",
    "recompile",
    "release",
    "reset",
    "rows",
    "schedule",
    "serving",
    "summary",
    "tune",
    "warmup",
]
