"""The command line: ``cachepass COMMAND``."""

from . import archives  # noqa: F401 (it adds its commands)
from .commands import main

__all__ = ["main"]
