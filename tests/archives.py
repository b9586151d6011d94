"""Archives that tests share: each is exported once, by the worker that asks first."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock


def exported_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> tuple[Path, Any]:
    """The archive ``name``, and what ``make(path)`` returned in the worker that made it."""
    folder = factory.getbasetemp()
    folder = folder.parent if "popen-gw" in folder.name else folder  # of all workers
    path, told = folder / f"{name}.cpz", folder / f"{name}.told"
    with FileLock(f"{path}.lock"):
        if not told.exists():
            told.write_bytes(pickle.dumps(make(path)))
    return path, pickle.loads(told.read_bytes())
