"""Schedules: at which denoising steps a group of cuts may be predicted instead of computed. Host code only.

Frozen values that combine by ``&``, ``|`` and ``~``::

    Every(5, offset=4) & WarmUp(3) & Final(1)
    Threshold(0.12) & WarmUp(8) & MaxSkips(consecutive=3)
"""

from .base import And, Bound, Not, Or, Past, Schedule, Step
from .key_steps import KeySteps
from .mask import Mask, Preset
from .measured import MAX_DEGREE, MagnitudeBudget, MaxSkips, Threshold
from .steps import Always, Before, Every, Final, Refresh, Retention, Timesteps, WarmUp

__all__ = [
    "MAX_DEGREE",
    "Always",
    "And",
    "Before",
    "Bound",
    "Every",
    "Final",
    "KeySteps",
    "MagnitudeBudget",
    "Mask",
    "MaxSkips",
    "Not",
    "Or",
    "Past",
    "Preset",
    "Refresh",
    "Retention",
    "Schedule",
    "Step",
    "Threshold",
    "Timesteps",
    "WarmUp",
]
