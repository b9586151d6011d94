"""Schedules, for users: at which steps a group is predicted (``recipe/schedule``)."""

from .recipe import schedule
from .recipe.schedule import *  # noqa: F403

__all__: list[str] = []
__all__ += schedule.__all__
