"""Where: what is forecast (cuts), and what a decision looks at (probes). Frozen values for ``CacheConfig``.

CacheConfig(cut=Blocks(first=1), probe=BlockResidual(1), ...)      first-block caching
CacheConfig(cut=Modules("attention"), ...)                         every attention by itself
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .value import Value

KINDS = ("attention", "self-attention", "cross-attention", "mlp", "block")
_CONDITIONS = ("each", "any", "none")


@dataclass(frozen=True)
class Blocks(Value):
    """What a stack of blocks adds to the model's residual streams, as one value per stream.

    Attributes:
        first: So many first blocks are always computed.
        last: So many last blocks are always computed.
        identifiers: Regexes (``re.fullmatch`` on module paths) of the stack's blocks. None: the entries of the lists
            that diffusers' hooks know (``blocks``, ``transformer_blocks``, ``single_transformer_blocks``, ``layers``,
            ...), in the order of their calls; where there is none of these, the entries of every list of blocks.
        residual: Forecast output minus input. False: the output itself.

    Raises:
        ConfigError: A value is of the wrong type or out of range.
    """

    first: int = 0
    last: int = 0
    identifiers: Sequence[str] | None = None
    residual: bool = True

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            _check_count(self, name, 0)
        if self.identifiers is not None:
            object.__setattr__(self, "identifiers", _patterns(self, "identifiers", self.identifiers))
        _check_flag(self, "residual")

    def __str__(self) -> str:
        kept = [f"{name} {value}" for name, value in (("first", self.first), ("last", self.last)) if value]
        return f"blocks{' but ' + ' and '.join(kept) if kept else ''}"


@dataclass(frozen=True, init=False)
class Modules(Value):
    """The outputs of modules, each by itself: ``Modules("attention")``, ``Modules("attention", r".*\\.ff")``.

    Attributes:
        identifiers: Each is a kind that is found by what a module does (``"attention"``, ``"mlp"``, ``"block"``) or a
            regex (``re.fullmatch`` on module paths).
        kind: Only modules of this kind: ``"attention"``, ``"self-attention"``, ``"cross-attention"``, ``"mlp"`` or
            ``"block"``; None: any.
        search: Regexes are searched for in the path (``re.search``).
        otherwise: What is taken where the identifiers match nothing in the model: an identifier.
        must_match: ``"each"`` identifier must match a module, or ``"any"`` of them; ``"none"``: a warning is enough.

    Raises:
        ConfigError: There is no identifier, one is not a regex, or a kind or condition does not exist.
    """

    identifiers: tuple[str, ...]
    kind: str | None = None
    search: bool = False
    otherwise: str | None = None
    must_match: str = "each"

    def __init__(self, *identifiers: str, kind: str | None = None, search: bool = False, otherwise: str | None = None,
                 must_match: str = "each") -> None:  # fmt: skip
        given = {"kind": kind, "search": search, "otherwise": otherwise, "must_match": must_match}
        for name, value in {"identifiers": _patterns(self, "identifiers", identifiers), **given}.items():
            object.__setattr__(self, name, value)
        if kind is not None and kind not in KINDS:
            raise _fail(self, "kind", f"there is no kind {kind!r}", "known: " + ", ".join(KINDS))
        if must_match not in _CONDITIONS:
            raise _fail(self, "must_match", f"there is no {must_match!r}", "known: " + ", ".join(_CONDITIONS))
        _check_flag(self, "search")
        if otherwise is not None:
            _patterns(self, "otherwise", (otherwise,))

    @classmethod
    def made_of(cls, fields: dict[str, Any]) -> Value:
        return cls(*fields.pop("identifiers"), **fields)

    def __str__(self) -> str:
        only = f"{self.kind} in " if self.kind is not None else ""
        return only + ", ".join(self.identifiers)


@dataclass(frozen=True)
class BlockResidual(Value):
    """Looks at what the first blocks of the stack add to the stream that comes from the latents.

    Attributes:
        blocks: So many; None: all.
        every: Compare with the last step's value, computed or not; False: with the last computed step's.
    """

    blocks: int | None = 1
    every: bool = False

    def __post_init__(self) -> None:
        if self.blocks is not None:
            _check_count(self, "blocks", 1)
        _check_flag(self, "every")


@dataclass(frozen=True)
class BlockOutput(Value):
    """Looks at the stream that comes from the latents, behind the first blocks of the stack.

    Attributes:
        blocks, every: As for :class:`BlockResidual`.
    """

    blocks: int | None = 1
    every: bool = False

    def __post_init__(self) -> None:
        if self.blocks is not None:
            _check_count(self, "blocks", 1)
        _check_flag(self, "every")


@dataclass(frozen=True)
class ModuleOutput(Value):
    """Looks at a module's output, such as the modulated input of the first block (TeaCache).

    Attributes:
        identifier: Regex (``re.fullmatch`` on module paths); the first call that matches counts. None: the first norm
            in the stack's first block.
        output: Which of its outputs, if it has several.
        every: As for :class:`BlockResidual`.
    """

    identifier: str | None = None
    output: int = 0
    every: bool = True

    def __post_init__(self) -> None:
        if self.identifier is not None:
            _patterns(self, "identifier", (self.identifier,))
        _check_count(self, "output", 0)
        _check_flag(self, "every")


@dataclass(frozen=True)
class Latents(Value):
    """Looks at the model's input, of each sample by itself.

    Attributes:
        transform: ``(latents, parameters) -> tensor`` with the samples in dimension 0: a torch function that is traced
            into the graph; ``parameters`` is a vector that holds sigma (the step's timestep / 1000), if ``sigma``.
        sigma: It takes sigma.
        every: As for :class:`BlockResidual`.
    """

    transform: Callable[..., Any] | None = None
    sigma: bool = False
    every: bool = True

    def __post_init__(self) -> None:
        if self.transform is not None and not callable(self.transform):
            raise _fail(self, "transform", f"expected a function, got {self.transform!r}")
        for name in ("sigma", "every"):
            _check_flag(self, name)


@dataclass(frozen=True)
class ModelOutput(Value):
    """Looks at what the model returns. That is known at a step's end: it can measure a run, and skip nothing of it.

    Attributes:
        every: As for :class:`BlockResidual`.
    """

    every: bool = True

    def __post_init__(self) -> None:
        _check_flag(self, "every")


Cut = Blocks | Modules
Probe = BlockResidual | BlockOutput | ModuleOutput | Latents | ModelOutput


def _fail(value: object, name: str, what: str, hint: str | None = None) -> ConfigError:
    return ConfigError(what, where=f"{type(value).__name__}.{name}", hint=hint)


def _check_count(value: object, name: str, low: int) -> None:
    count = getattr(value, name)
    if isinstance(count, bool) or not isinstance(count, int):
        raise _fail(value, name, f"expected an int (>= {low}), got {count!r} ({type(count).__name__})")
    if count < low:
        raise _fail(value, name, f"{count} is out of range", f"allowed: >= {low}")


def _check_flag(value: object, name: str) -> None:
    if not isinstance(getattr(value, name), bool):
        raise _fail(value, name, f"expected a bool, got {getattr(value, name)!r}")


def _patterns(value: object, name: str, patterns: object) -> tuple[str, ...]:
    if isinstance(patterns, str) or not isinstance(patterns, (list, tuple)) or not patterns or any(
        not isinstance(pattern, str) for pattern in patterns
    ):  # fmt: skip
        raise _fail(value, name, f"expected a list of regex strings, got {patterns!r}")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise _fail(value, name, f"{pattern!r} is not a regex: {error}") from None
    return tuple(patterns)
