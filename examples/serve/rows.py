"""One step of several trajectories at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import cachepass


def call_rows(model: Any, names: Sequence[str], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's output for inputs with one row for each name, each row in the cache context of that name."""
    outputs = []
    for index, name in enumerate(names):
        with cachepass.cache_context(name):
            outputs.append(model(**{key: value[index : index + 1] for key, value in inputs.items()}).sample)
    return torch.cat(outputs)


def free(model: Any, names: Sequence[str]) -> None:
    """Let go of what is kept for trajectories that are over, or were given up."""
    for name in names:
        cachepass.reset(model, context=name)
