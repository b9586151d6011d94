"""Forecasts, for users: what stands in for what is not computed (``recipe/forecast``)."""

from .recipe import forecast
from .recipe.forecast import *  # noqa: F403

__all__: list[str] = []
__all__ += forecast.__all__
