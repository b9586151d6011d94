"""Where: what is forecast (cuts), and what a decision looks at (probes). Frozen values for ``CacheConfig``.

CacheConfig(cut=Blocks(first=1), probe=BlockResidual(1), ...)      first-block caching
CacheConfig(cut=Modules("attention"), ...)                         every attention by itself
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .checks import check_among, check_flag, check_function, check_int, check_patterns, fail
from .value import Value
from .vocabulary import Region

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
            check_int(self, name, 0)
        if self.identifiers is not None:
            _named(self, "identifiers", self.identifiers)
            check_patterns(self, "identifiers")
        check_flag(self, "residual")

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

    def __init__(
        self,
        *identifiers: str,
        kind: str | None = None,
        search: bool = False,
        otherwise: str | None = None,
        must_match: str = "each",
    ) -> None:
        given = {"kind": kind, "search": search, "otherwise": otherwise, "must_match": must_match}
        for name, value in {"identifiers": _named(self, "identifiers", identifiers), **given}.items():
            object.__setattr__(self, name, value)
        if kind is not None:
            check_among(self, "kind", "kind", KINDS)
        check_among(self, "must_match", "condition", _CONDITIONS)
        check_flag(self, "search")
        if otherwise is not None:
            check_patterns(self, "otherwise", value=(otherwise,))

    @classmethod
    def made_of(cls, fields: dict[str, Any]) -> Value:
        return cls(*fields.pop("identifiers"), **fields)

    @property
    def compare(self) -> Callable[[str, str], object]:
        """How an identifier that is a regex is compared with a path."""
        return re.search if self.search else re.fullmatch

    def fits(self, region: Region) -> bool:
        """A region is of the kind."""
        return self.kind is None or region.is_of(self.kind)

    def takes(self, region: Region) -> bool:
        """A region is of the kind, and an identifier finds it."""
        return self.fits(region) and any(region.matches(identifier, self.compare) for identifier in self.identifiers)

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
            check_int(self, "blocks", 1)
        check_flag(self, "every")


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
            check_int(self, "blocks", 1)
        check_flag(self, "every")


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
            check_patterns(self, "identifier", value=(self.identifier,))
        check_int(self, "output", 0)
        check_flag(self, "every")


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
        check_function(self, "transform")
        check_flag(self, "sigma", "every")


@dataclass(frozen=True)
class ModelOutput(Value):
    """Looks at what the model returns. That is known at a step's end: it can measure a run, and skip nothing of it.

    Attributes:
        every: As for :class:`BlockResidual`.
    """

    every: bool = True

    def __post_init__(self) -> None:
        check_flag(self, "every")


Cut = Blocks | Modules
Probe = BlockResidual | BlockOutput | ModuleOutput | Latents | ModelOutput


def _named(value: Value, name: str, identifiers: object) -> tuple[str, ...]:
    """Regexes, one at least."""
    if isinstance(identifiers, (list, tuple)) and not identifiers:
        raise fail(value, name, f"expected a list of regex strings, got {identifiers!r}")
    return check_patterns(value, name, value=identifiers)
