"""Records: what lies where in an archive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import MethodConfig
from ..config.base import RecipeConfig
from ..recipe.recipe import Recipe

MANIFEST = "extra/cachepass/manifest.json"
CONFIG = "extra/cachepass/config.json"
SEAL = "extra/cachepass/sha256.json"  # of the two above; the manifest has those of the programs
TIMETABLES = "extra/cachepass/timetable/"  # and the number of the size
TENSORS = "extra/cachepass/tensors/"


def config_of(saved: Mapping[str, Any]) -> MethodConfig:
    """The config of an archive.

    Raises:
        ConfigError: It names a class that is not known here.
    """
    return RecipeConfig(Recipe.from_dict(saved)) if "recipe" in saved else MethodConfig.from_dict(saved)
