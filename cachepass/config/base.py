"""What the user says about a method: one config class for each.

The configs carry diffusers' class and field names, defaults and meaning, so ``diffusers.TaylorSeerCacheConfig(...)``
itself, ``{"method": "taylorseer", ...}`` and ``"taylorseer"`` all parse to the same object. Everything is checked when
the object is made, before any model is traced.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ..errors import ConfigError, OptionError, closest
from ..recipe.checks import fail
from ..recipe.recipe import Part, Recipe
from ..recipe.value import SCHEMA, check_schema, from_dict, to_dict
from ..recipe.vocabulary import Region

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_: Any) -> Callable[[_T], _T]:
        """For type checkers: what is decorated makes dataclasses."""
        return lambda function: function


_ALIASES = {"pyramid_attention_broadcast": "pab", "faster_cache": "fastercache"}
_METHODS: dict[str, type[MethodConfig]] = {}
_T = TypeVar("_T", bound="MethodConfig")


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The value of a dataclass's field where none is given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


class MethodConfig:
    """Base of the method configs: classes decorated with ``cache_config``."""

    method: ClassVar[str] = ""
    fewer: ClassVar[str] = ""  # what to give where the model has too few blocks, for a hint

    def check(self) -> None:
        """Raise a ConfigError for values that make no sense; runs at construction."""

    @property
    def label(self) -> str:
        """The method, and the fields that differ from their defaults: ``"taylorseer(cache_interval=3)"``."""
        own: list[str] = []
        for f in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value, default = getattr(self, f.name), default_of(f)
            if value is not default and value != default:
                own.append(f"{f.name}={value!r}")
        return f"{self.method}({', '.join(own)})" if own else self.method

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON takes it: ``{"schema": 1, "method": name, ...fields}``.

        Raises:
            ConfigError: A field holds a function of Python's.
        """
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        values = {f.name: to_dict(getattr(self, f.name), f"{type(self).__name__}.{f.name}") for f in fields}
        return {"schema": SCHEMA, "method": self.method, **values}

    def save(self, path: str | Path) -> None:
        """Write the config as JSON: ``options={"cache": "path.json"}`` reads it.

        Raises:
            ConfigError: A field holds a function of Python's.
        """
        text = json.dumps(self.to_dict(), indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> MethodConfig:
        """The config that was saved, equal to it.

        Raises:
            ConfigError: It is of another schema, or a field makes no sense.
            OptionError: There is no such method.
        """
        fields = dict(saved)
        check_schema(fields, "config")
        del fields["schema"]
        name = fields.pop("method", None)
        return _config_class(str(name))(**{key: from_dict(value, f"{name}.{key}") for key, value in fields.items()})

    def recipe(self, num_inference_steps: int | None) -> Recipe:  # noqa: ARG002 (for those that ask)
        """What the method is made of, for runs of so many steps; None: unknown.

        Raises:
            ConfigError: The number of steps is needed; or the config does not say what it is made of.
        """
        raise ConfigError(
            "it has no recipe",
            where=type(self).__name__,
            hint="def recipe(self, num_inference_steps): return Recipe(Group(...))",
        )

    # What a recipe's parts are called by the user, for messages.

    def where(self, group: str, part: Part | None = None) -> str:  # noqa: ARG002 (for those with several)
        """The field that says which modules a part takes; or, without one, when its group is predicted."""
        field = "schedule" if part is None else "cut"
        return f"{type(self).__name__}.{field}" if hasattr(self, field) else type(self).__name__

    def review(self, regions: Sequence[Region]) -> None:
        """Warn of what the user might not expect of these regions of a whole model."""

    def review_parts(self, regions: Sequence[Region], model: Sequence[str]) -> None:
        """Raise a NoMatchError for what is needed of a model and in none of its graphs."""

    def why_never(self, num_inference_steps: int | None) -> str | None:  # noqa: ARG002
        """The reason why no step can be predicted, by the names of fields; None: none that has to do with one."""
        return None

    def why_other(self, steps: int) -> str | None:  # noqa: ARG002
        """What to say of a run of so many steps, if it was made for runs of another number of them."""
        return None

    def why_idle(self, recipe: Recipe, timesteps: tuple[float, float] | None) -> str | None:
        """Why a whole run predicted nothing; None: on purpose; ``timesteps`` is the (lowest, highest) seen."""
        seen = f"; timesteps seen: {timesteps[0]:g} to {timesteps[1]:g}" if timesteps else ""
        schedules = ", ".join(dict.fromkeys(str(group.schedule) for group in recipe.groups))
        return f"the schedule chose to compute every step{seen} ({schedules})"

    def why_left(self, region: Region) -> str | None:
        """Why a region of a kind that is cut elsewhere is not, where no group takes it; None: nobody wonders."""
        return "no group takes it" if region.is_attention else None

    @classmethod
    def fail(cls, name: str, what: str, hint: str | None = None) -> ConfigError:
        """The error for a field's value: ``raise self.fail("interval", f"{self.interval} is out of range")``."""
        return fail(cls, name, what, hint)


@dataclass_transform(frozen_default=True)
def cache_config(name: str) -> Callable[[type[_T]], type[_T]]:
    """Class decorator for a method's config: makes it a frozen dataclass, and ``name`` an ``options["cache"]``.

    A wrong field raises a ConfigError that names the closest one.

    Raises:
        OptionError: There is a method of this name already.
    """
    if name in _METHODS or name in _ALIASES:
        raise OptionError(f"there is a method {name!r} already", where="cache_config", hint="choose another name")

    def wrap(cls: type[_T]) -> type[_T]:
        cls = dataclass(frozen=True)(cls)
        known = [f.name for f in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
        plain = cls.__init__

        @functools.wraps(plain)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            for key in kwargs:
                if key not in known:
                    raise ConfigError(f"unknown field {key!r}", where=cls.__name__, hint=closest(key, known))
            plain(self, *args, **kwargs)
            self.check()

        cls.__init__ = checked  # pyright: ignore[reportAttributeAccessIssue]
        cls.method = name
        _METHODS[name] = cls
        return cls

    return wrap


def method_names() -> list[str]:
    return sorted(_METHODS)


@dataclass(frozen=True)
class RecipeConfig(MethodConfig):
    """A recipe that was given as it is."""

    given: Recipe

    def to_dict(self) -> dict[str, Any]:
        return self.given.to_dict()

    @property
    def label(self) -> str:
        return f"recipe({', '.join(group.name for group in self.given.groups)})"

    def recipe(self, num_inference_steps: int | None) -> Recipe:
        return self.given.bind(num_inference_steps)

    def where(self, group: str, part: Part | None = None) -> str:
        return f"Group({group!r}).{'schedule' if part is None else 'parts'}"


def load_config(path: str | Path) -> MethodConfig:
    """The config, or recipe, in a JSON file.

    Raises:
        OptionError: The file cannot be read.
        ConfigError: What it holds makes no sense.
    """
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot be read: {error}", where=f'options["cache"] = {str(path)!r}') from None
    if not isinstance(saved, dict):
        raise OptionError(
            "holds no recipe", where=f'options["cache"] = {str(path)!r}', hint="write json.dumps(config.to_dict())"
        )
    if "tuning" in saved:
        return _only_one(saved, path)
    return RecipeConfig(Recipe.from_dict(saved)) if "recipe" in saved else MethodConfig.from_dict(saved)


def _only_one(saved: Mapping[str, Any], path: str | Path) -> MethodConfig:
    """The config of a file that ``Tuning.save`` wrote, if it holds one alone."""
    check_schema(saved, "tuning")
    tuning = saved["tuning"]
    points = tuning.get("frontier") if isinstance(tuning, Mapping) else None
    if not isinstance(points, list) or not points or not all(isinstance(p, Mapping) and "config" in p for p in points):
        raise ConfigError(
            "there is no config in it", where=f'options["cache"] = {str(path)!r}', hint="tune again, and save it"
        )
    if len(points) > 1:
        raise ConfigError(
            f"it holds {len(points)} configs, for {', '.join(str(p.get('computed')) for p in points)} computed steps",
            where=f'options["cache"] = {str(path)!r}',
            hint=f'give one of them: {{"cache": cachepass.Tuning.load({str(path)!r}).config(steps=...)}}',
        )
    return MethodConfig.from_dict(points[0]["config"])


def parse_cache(value: object) -> MethodConfig:
    """A config from what ``options["cache"]`` may hold: ours, diffusers' or cache-dit's, a dict with ``"method"``, or a
    name."""
    if isinstance(value, MethodConfig):
        return value
    if isinstance(value, Recipe):
        return RecipeConfig(value)
    if isinstance(value, (str, Path)) and str(value).endswith(".json"):
        return load_config(value)
    if isinstance(value, str):
        return _config_class(value)()
    if isinstance(value, Mapping):
        fields = dict(value)
        name = fields.pop("method", None)
        if not isinstance(name, str):
            raise OptionError('a dict needs the key "method"', where='options["cache"]', hint=_methods_hint())
        return _config_class(name)(**fields)
    ours = {cls.__name__: cls for cls in _METHODS.values()}.get(type(value).__name__)
    if ours is not None and dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ours(**_shared_fields(ours, value))
    raise OptionError(
        f"cannot be read as a cache config: {value!r} ({type(value).__name__})",
        where='options["cache"]',
        hint="give a config object, a dict or a method's name. " + _methods_hint(),
    )


def _shared_fields(ours: type[MethodConfig], value: Any) -> dict[str, Any]:
    """The fields of another library's config that ours has too. Others mean nothing here, and must have their defaults
    (cache-dit's ``cache_type``)."""
    known = {f.name for f in dataclasses.fields(ours)}  # pyright: ignore[reportArgumentType]
    fields: dict[str, Any] = {}
    for f in dataclasses.fields(value):
        given, default = getattr(value, f.name), default_of(f)
        if f.name in known:
            fields[f.name] = given
        elif given is not default and given != default:
            raise ours.fail(f.name, f"{given!r} has no equivalent here", "leave it at its default")
    return fields


def _config_class(name: str) -> Callable[..., MethodConfig]:
    key = _ALIASES.get(name, name)
    if key not in _METHODS:
        raise OptionError(f"there is no method {name!r}", where='options["cache"]', hint=closest(name, _METHODS))
    return _METHODS[key]


def _methods_hint() -> str:
    return "methods: " + ", ".join(method_names())
