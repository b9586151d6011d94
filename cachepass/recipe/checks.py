"""Checks: whether the fields of a value make sense. There is one error for each kind of mistake."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import ConfigError, closest

_FIELD: Any = object()  # the field's own value is checked


def fail(owner: object, name: str, what: str, hint: str | None = None) -> ConfigError:
    """The error for a field of a value, or of a class."""
    cls = owner if isinstance(owner, type) else type(owner)
    return ConfigError(what, where=f"{cls.__name__}.{name}", hint=hint)


def check_int(
    owner: object, name: str, low: int, high: float = math.inf, *, optional: bool = False, value: Any = _FIELD
) -> None:
    """An int from ``low`` to ``high``, both included; ``value``: where it is not the field itself."""
    value = getattr(owner, name) if value is _FIELD else value
    if optional and value is None:
        return
    bound = f">= {low}" if high == math.inf else f"{low} to {high:.0f}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise fail(owner, name, f"expected an int ({bound}), got {value!r} ({type(value).__name__})")
    if not low <= value <= high:
        raise fail(owner, name, f"{value} is out of range", f"allowed: {bound}")


def check_number(
    owner: object,
    name: str,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    value: Any = _FIELD,
) -> None:
    """A finite number from ``low`` to ``high``; ``above``: ``low`` itself is none. A tensor of one becomes it."""
    own = value is _FIELD
    value = getattr(owner, name) if own else value
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
        if own:
            object.__setattr__(owner, name, value)
    bound = f"{'>' if above else '>='} {low:g}" if high == math.inf else f"{low:g} to {high:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise fail(owner, name, f"expected a finite number, got {value!r} ({type(value).__name__})")
    if not low <= value <= high or (above and value == low):
        raise fail(owner, name, f"{value} is out of range", f"allowed: {bound}")


def check_flag(owner: object, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(owner, name), bool):
            raise fail(owner, name, f"expected a bool, got {getattr(owner, name)!r}")


def check_function(owner: object, name: str, what: str = "a function") -> None:
    """A function, or None."""
    value = getattr(owner, name)
    if value is not None and not callable(value):
        raise fail(owner, name, f"expected {what}, got {value!r}")


def check_among(owner: object, name: str, what: str, known: Sequence[str]) -> None:
    """One of the names that are known."""
    value = getattr(owner, name)
    if value not in known:
        raise fail(owner, name, f"there is no {what} {value!r}", closest(str(value), known))


def check_range(owner: object, name: str) -> None:
    """Two numbers, the first one less than the second."""
    value = getattr(owner, name)
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    if not pair or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in value):
        raise fail(owner, name, f"expected two numbers (lo, hi), got {value!r}")
    if not value[0] < value[1]:
        raise fail(owner, name, f"the range {tuple(value)} is empty or reversed", "give (lo, hi) with lo < hi")


def check_patterns(owner: object, name: str, *, optional: bool = False, value: Any = _FIELD) -> tuple[str, ...]:
    """Regexes; the field becomes a tuple of them, so that values compare and hash."""
    own = value is _FIELD
    value = getattr(owner, name) if own else value
    if optional and value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, (list, tuple)) or any(not isinstance(v, str) for v in value):
        raise fail(owner, name, f"expected a list of regex strings, got {value!r}", f"write [{value!r}] for one")
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            hint = f"as it stands, it is written {re.escape(pattern)!r}"
            raise fail(owner, name, f"{pattern!r} is not a regex: {error}", hint) from None
    if own:
        object.__setattr__(owner, name, tuple(value))
    return tuple(value)


def check_grid(owner: object, name: str, hint: str | None = None) -> None:
    """(height, width) or (frames, height, width)."""
    grid = getattr(owner, name)
    if (
        not isinstance(grid, (tuple, list))
        or len(grid) not in (2, 3)
        or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in grid)
    ):
        raise fail(owner, name, f"expected (height, width) or (frames, height, width), got {grid!r}", hint)
