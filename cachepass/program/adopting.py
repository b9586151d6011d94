"""Adopting: a program whose last results slots take over, as it runs (``adopt.py`` makes it)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def adopting(run: Callable[[list[Any]], Any], slots: Sequence[int]) -> Callable[[list[Any]], Any]:
    """Run a program whose last results slots take over; the results without these. ``slots``: indices of its inputs."""

    def run_and_adopt(given: list[Any]) -> Any:
        taking = [given[i] for i in slots]
        sizes = [slot.untyped_storage().nbytes() for slot in taking]
        for slot in taking:
            slot.untyped_storage().resize_(0)
        try:
            results = run(given)
        except BaseException:  # a slot without memory could not be cleared
            for slot, size in zip(taking, sizes, strict=True):
                slot.untyped_storage().resize_(size)
            raise
        own = len(results) - len(taking)
        with torch.no_grad():
            for slot, value in zip(taking, results[own:], strict=True):
                slot.set_(value)
        return results[:own]

    return run_and_adopt
