"""The only door to private torch APIs: one function per need, each present in torch 2.11, 2.13 and 2.15 or guarded.

Nothing here knows what caching is. Whatever a new torch release renames is renamed in this package and nowhere else.
What is behind the door stands in ``__init__.pyi``. A file is imported when something of it is first asked for, so that
an exported program runs without Dynamo and Inductor; ``offline``, ``playing`` and ``ahead`` are imported by name.
"""

from typing import Any

import lazy_loader

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    value = globals()[name] = _load(name)  # asked for once: some are called in every step
    return value
