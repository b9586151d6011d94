"""Values: what recipes are made of. They can be saved as JSON, and loaded again.

    to_dict : a value -> plain dicts, lists, strings and numbers, each value with its class's name
    from_dict : the same -> the value, equal to what was saved

What holds a function of Python's cannot be saved, and says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ConfigError, closest

SCHEMA = 1  # rises when what was saved before would be read as something else
_TYPE = "type"
_known: dict[str, type[Value]] = {}


class Value:
    """Base of the values: subclasses are frozen dataclasses, and known by their names."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = _known.get(cls.__name__)
        ours = own is not None and cls.__module__.startswith("cachepass.") and own.__module__ != cls.__module__
        assert not ours, f"two values are called {cls.__name__}"
        if own is None or not own.__module__.startswith("cachepass."):
            _known[cls.__name__] = cls

    @classmethod
    def made_of(cls, fields: dict[str, Any]) -> Value:
        """The value with these fields."""
        return cls(**fields)


def check_schema(saved: Mapping[str, Any], where: str) -> None:
    """Raise a ConfigError unless it was saved by a version that means the same by it."""
    if saved.get("schema") != SCHEMA:
        raise ConfigError(
            f"schema {saved.get('schema')!r} is not {SCHEMA}",
            where=where,
            hint="save it anew with this version of cachepass",
        )


def to_dict(value: Any, where: str) -> Any:
    """A value as JSON takes it; ``where`` it stands is for messages.

    Raises:
        ConfigError: It cannot be saved.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_TYPE: "float", "value": str(value)}
    if isinstance(value, torch.dtype):
        return {_TYPE: "dtype", "value": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {_TYPE: "device", "value": str(value)}
    if isinstance(value, (tuple, list)):
        return [to_dict(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Value) and dataclasses.is_dataclass(value):
        own = [f.name for f in dataclasses.fields(value) if f.compare]
        return {_TYPE: type(value).__name__, **{n: to_dict(getattr(value, n), f"{where}.{n}") for n in own}}
    what = "a function of Python's" if callable(value) else f"a {type(value).__name__}"
    raise ConfigError(
        f"{what} cannot be saved: {value!r}",
        where=where,
        hint="use it in the process that made it, or make it a value of numbers and names",
    )


def from_dict(saved: Any, where: str) -> Any:
    """The value that was saved.

    Raises:
        ConfigError: It names a class or a field that does not exist, or a field has a value that makes no sense.
    """
    if isinstance(saved, list):
        return tuple(from_dict(item, f"{where}[{i}]") for i, item in enumerate(saved))
    if not isinstance(saved, Mapping):
        return saved
    fields = {name: value for name, value in saved.items() if name != _TYPE}
    name = saved.get(_TYPE)
    if name == "float":
        return float(fields["value"])
    if name == "dtype":
        return getattr(torch, fields["value"])
    if name == "device":
        return torch.device(fields["value"])
    cls = _known.get(str(name))
    if cls is None or not dataclasses.is_dataclass(cls):
        raise ConfigError(
            f"there is no value {name!r}",
            where=where,
            hint=f"{closest(str(name), _known)}; import the file that defines it first",
        )
    unknown = fields.keys() - {f.name for f in dataclasses.fields(cls)}
    if unknown:
        raise ConfigError(f"{name} has no field {min(unknown)!r}", where=where)
    return cls.made_of({field: from_dict(value, f"{where}.{field}") for field, value in fields.items()})
