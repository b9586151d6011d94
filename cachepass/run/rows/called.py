"""Called as rows: a call of a compiled model with the inputs of several requests, and what it returns for all of them.

    with cachepass.rows("req-7", "req-9"):
        velocity = compiled(latents, timestep, prompt)       # [2, ...], [2], [2, ...]

The compiled model is called once, with the first row's part of every input: what Dynamo knows of it is one request, so
any number of rows is the same capture. Its graph then makes the steps of all rows (``call.py``), and whatever the model
makes of its results for the first row is made of the others' too.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ... import _torch
from ...capture.inputs import TIMESTEP_NAMES, find_latents
from ...errors import RowsError
from ...options import is_declared
from ..context import RowNames, Told, check_names, saying, surroundings, telling
from ..live import compiled_in_place, programs_in
from .call import call_rows
from .step import ROWS, RowsCall

# Inputs that have a sample of each image in all models known today, beside latents and timestep.
_SAMPLES = {
    "encoder_attention_mask", "attention_mask", "text_embedding_mask", "text_embedding_mask_t5", "pooled_projections",
    "guidance", "class_labels", "image_embeds", "prompt", "prompt_embeds", "text", "context", "y", "labels",
    *TIMESTEP_NAMES,
}  # fmt: skip
# Those that are tables of positions: the same for all samples.
_POSITIONS = ("img_ids", "txt_ids", "image_rotary_emb", "rotary_emb", "freqs_cis", "pos_embed", "position_ids")


@contextlib.contextmanager
def rows(
    *names: str, timesteps: Sequence[float] | None = None, dims: Mapping[str, int | None] | None = None
) -> Iterator[None]:
    """Make a step of several requests in one call of a compiled model: each row of its inputs is one of them.

        with cachepass.rows("req-7", "req-9"):
            velocity = compiled(latents, timestep, prompt)      # two rows each, also the result
        cachepass.release("req-7")                              # it is over

    Each row is a trajectory of its name, as if it were called alone in ``cache_context(name)``: it has its own clock,
    schedule, history and decisions, begins when its name first comes and may stand at any step. Rows that are in one
    phase of the method run as one batch. Names come below the contexts around, and contexts inside below them: guidance
    by two calls opens ``cache_context("cond")`` and ``("uncond")`` in this block, or names rows ``"req-7/cond"``.

    What several requests keep lies in a pool of ``options["pool_requests"]`` places; one is free again after
    :func:`release`, or when a run of known length is over.

    An input has rows if its first dimension is as many as there are names (a list: if it has as many items, where the
    latents are a list); parameters, numbers and everything else are the same for all. Rows are of equal sizes.

    Args:
        names: Of the requests, each once, in the order of the rows.
        timesteps: Of each row, in the unit of the config's ranges. Given here, none is read from the device.
        dims: For inputs of which that is not true, by name: the dimension in which the rows stand, or None: it is the
            same for all.

    Raises:
        TypeError: A name is not a string, or empty.
        RowsError: A name is there twice, ``timesteps`` are not as many; or, of the call: an input cannot be parted, or
            the model takes no rows, with the reason.
    """
    check_names(names)
    if timesteps is not None and len(timesteps) != len(names):
        raise RowsError(f"{len(timesteps)} timesteps for {len(names)} rows", where="cachepass.rows")
    known = surroundings()
    if known.rows is not None:
        raise RowsError(
            "a block of rows stands in another one",
            where="cachepass.rows",
            hint="a context inside of rows is named by cachepass.cache_context",
        )
    _torch.on_compiled_calls(called)
    for module in compiled_in_place():
        _intercept(module)
    given = None if timesteps is None else tuple(map(float, timesteps))
    with telling(rows=RowNames(names, len(known.names), given, dict(dims or {}))):
        yield


def _intercept(module: torch.nn.Module) -> None:
    """Have calls of a module that was compiled in place come here first."""
    own: Any = module._compiled_call_impl
    if own is not None and not hasattr(own, "_cachepass_rows"):
        held = weakref.ref(module)

        @functools.wraps(own)
        def call(*args: Any, **kwargs: Any) -> Any:
            return called(held(), own, args, kwargs)

        call._cachepass_rows = True  # pyright: ignore[reportAttributeAccessIssue]
        module._compiled_call_impl = call


def called(
    module: torch.nn.Module | None, call: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """What ``call(*args, **kwargs)`` of a compiled module returns; in a block of :func:`rows`, of all rows."""
    said = surroundings()
    if said.rows is None or ROWS.get() is not None or module is None:
        return call(*args, **kwargs)
    parted = _Parting(module, said).part(args, kwargs)
    batch = RowsCall(said, parted.leading, parted.given, call_rows)
    token = ROWS.set(batch)
    try:
        with saying(said.row(0)):
            first = call(*parted.args, **parted.kwargs)
    finally:
        ROWS.reset(token)
    if batch.results is None:
        raise RowsError(
            f"no graph with a cache ran in the call of {type(module).__name__}",
            where="cachepass.rows",
            hint='compile it with backend="cached_inductor" and options={"cache": ...}',
        )
    return _Joining(batch, parted).join(first)


# ---- inputs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parted:
    """The arguments of the first row, and what all rows are given of each tensor in them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leading: dict[int, torch.Tensor]
    given: list[Any]
    listed: bool


class _Parting:
    """Takes the first row out of the arguments of a call."""

    def __init__(self, module: torch.nn.Module, said: Told) -> None:
        rows = said.rows
        assert rows is not None
        self.module, self.rows, self.count = module, rows, len(rows.names)
        self.leading: dict[int, torch.Tensor] = {}
        self.given: list[Any] = []
        self.listed = False
        self._latents: str | None = None
        self._known: dict[tuple[int, int], torch.Tensor] = {}
        self._alone = _sizes_alone(module)
        self._asked = dict.fromkeys(rows.dims, False)

    def part(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Parted:
        """
        Raises:
            RowsError: The latents have no row for each name, or it cannot be told whether an input has.
        """
        names = _argument_names(self.module, len(args))
        given = {**dict(zip(names, args, strict=True)), **kwargs}
        self._check_latents(given)
        parted = {name: self._value(name, value) for name, value in given.items()}
        unknown = [name for name, found in self._asked.items() if not found]
        if unknown:
            raise RowsError(
                f"the call has no input {unknown[0]!r}",
                where="cachepass.rows(dims=...)",
                hint=f"inputs: {', '.join(given)}",
            )
        own = tuple(parted[name] for name in names)
        rest = {name: parted[name] for name in kwargs}
        return _Parted(own, rest, self.leading, self.given, self.listed)

    def _check_latents(self, given: Mapping[str, Any]) -> None:
        names = list(given)
        found = find_latents(names, list(given.values()))
        latents: Any = given[names[found[0]]] if found else None
        size = len(latents) if isinstance(latents, (list, tuple)) or _has_rows(latents) else None
        self.listed = isinstance(latents, (list, tuple))
        self._latents = names[found[0]] if found else None
        if found and size != self.count and self._dim(names[found[0]]) is _UNSAID:
            several = size is not None and size % self.count == 0 and size > self.count
            raise RowsError(
                f"{self.count} names for {'a tensor without rows' if size is None else f'{size} rows'}",
                where=f"input {names[found[0]]}",
                hint=(
                    "give each sample a name; those of guidance batches 'a/uncond', 'b/uncond', 'a/cond', 'b/cond'"
                    if several
                    else "one name for each row, in their order"
                ),
            )

    def _dim(self, name: str) -> Any:
        """In which dimension the user said that an input's rows stand."""
        for asked, dim in self.rows.dims.items():
            if is_declared(name, asked):
                self._asked[asked] = True
                return dim
        return _UNSAID

    def _value(self, name: str, value: Any) -> Any:
        dim = self._dim(name)
        if dim is None:
            return value
        if isinstance(value, torch.Tensor):
            return self._tensor(name, value, dim)
        if isinstance(value, dict):
            return {key: self._value(f"{name}.{key}", item) for key, item in value.items()}
        if isinstance(value, list) and len(value) == self.count and (self.listed or not _holds_tensors(value)):
            return [self._item(name, value)]
        if isinstance(value, (list, tuple)):
            items = [self._value(f"{name}.{i}", item) for i, item in enumerate(value)]
            return type(value)(items) if type(value) in (list, tuple) else value
        return value

    def _tensor(self, name: str, value: torch.Tensor, dim: Any) -> torch.Tensor:
        if dim is _UNSAID:
            if not (_has_rows(value) and self._is_parted(name, value)):
                return value
            dim = 0
        elif not -value.ndim <= dim < value.ndim or value.shape[dim] != self.count:
            raise RowsError(f"{tuple(value.shape)} has no {self.count} rows in dimension {dim}", where=f"input {name}")
        dim %= value.ndim
        if (id(value), dim) not in self._known:  # a tensor that is given twice is given twice to the first row
            first = value.narrow(dim, 0, 1)
            self._known[id(value), dim] = self._note(first, value.movedim(dim, 0).unsqueeze(dim + 1))
        return self._known[id(value), dim]

    def _is_parted(self, name: str, value: torch.Tensor) -> bool:
        """Whether an input has a row for each name."""
        if self.count == 1:  # any answer is right; the one of calls of several has programs already
            known = _parted.get(self.module, {}).get(name)
            return value.shape[0] == 1 and (not _is_table(name, value) if known is None else known)
        parted = value.shape[0] == self.count and self._has_a_row_for_each(name)
        _parted.setdefault(self.module, {})[name] = parted
        return parted

    def _has_a_row_for_each(self, name: str) -> bool:
        if name == self._latents:
            return True
        alone = self._alone.get(name)
        if alone is not None:
            return alone == 1  # else it has as many in the call of one request
        short = name.rpartition(".")[2]
        if short not in _SAMPLES and not short.startswith("encoder_hidden_states"):
            raise RowsError(
                f"its first dimension is {self.count}, as many as there are rows, and it may be the same for all",
                where=f"input {name}",
                hint=f'say so: cachepass.rows(..., dims={{"{name}": None}}), or 0 if it has a row for each. '
                "Nothing is asked once one request was called alone, which warmup does: that tells",
            )
        return True

    def _item(self, name: str, items: list[Any]) -> Any:
        """What the first row is given of a list with an item for each."""
        first = items[0]
        if not isinstance(first, torch.Tensor):
            if any(item != first for item in items[1:]):
                raise RowsError(
                    f"its items differ: {items!r}",
                    where=f"input {name}",
                    hint="rows of one call are of equal sizes: call those of other sizes by themselves. A list that is "
                    f'the same for all: cachepass.rows(..., dims={{"{name}": None}})',
                )
            return first
        shapes = [tuple(item.shape) for item in items]
        if any(shape != shapes[0] for shape in shapes):
            raise RowsError(
                f"its items are of different sizes: {', '.join(map(str, dict.fromkeys(shapes)))}",
                where=f"input {name}",
                hint="call requests of other sizes by themselves",
            )
        return self._note(first, torch.stack(items))

    def _note(self, first: torch.Tensor, leading: torch.Tensor) -> torch.Tensor:
        self.leading[id(first)] = leading
        self.given.append(first)
        return first


_UNSAID: Any = object()
_parted: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, bool]] = weakref.WeakKeyDictionary()


def _is_table(name: str, value: torch.Tensor) -> bool:
    """By its name, an input may be a table of positions; of those that have samples, rows have two dimensions."""
    return value.ndim < 3 and any(part in _POSITIONS for part in name.split("."))


def _has_rows(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, (list, tuple)) and any(map(_holds_tensors, value)))


def _argument_names(module: torch.nn.Module, count: int) -> list[str]:
    """Names of the first positional arguments of a module's call."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return (names[:count] + [f"args.{i}" for i in range(len(names), count)])[:count]


def _sizes_alone(module: torch.nn.Module) -> dict[str, int]:
    """The first dimensions of the inputs of calls of one sample, as far as they were captured."""
    found: dict[str, int] = {}
    for dispatcher in programs_in(module):
        if dispatcher.layout.samples == 1:
            sizes = dispatcher.layout.first_sizes
            found.update((name.removeprefix("kwargs."), size) for name, size in sizes)
    return found


# ---- results --------------------------------------------------------------------------------------------------------


class _Joining:
    """Makes of what a model returned for the first row what it returns for all of them."""

    def __init__(self, batch: RowsCall, parted: _Parted) -> None:
        self.count, self.listed = batch.count, parted.listed
        results = [(value, led) for value, led in batch.results or () if isinstance(value, torch.Tensor)]
        firsts = [(value[0], value) for value, led in results if led]
        firsts += [(first, batch.leading[id(first)]) for first in batch.given]
        # What the first row has, and all rows of it, by the memory that the former lies in.
        self._led: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for first, rows in firsts:
            if first.stride() == rows.stride()[1:]:  # items of a list are joined anew
                self._led.setdefault(_torch.storage_of(first), []).append((first, rows))
        self._leading = batch.leading
        given = [value for value in _torch.flatten((parted.args, parted.kwargs))[0] if isinstance(value, torch.Tensor)]
        same = (*(value for value, led in results if not led), *(v for v in given if id(v) not in self._leading))
        self._same = {_torch.storage_of(value) for value in same}

    def join(self, value: Any) -> Any:
        """
        Raises:
            RowsError: Something in it is neither of the graph's results nor of the inputs.
        """
        return _torch.map_leaves(self._leaf, value, self._is_list)

    def _is_list(self, value: Any) -> bool:
        """A list of the first row's only sample."""
        return self.listed and isinstance(value, list) and len(value) == 1 and isinstance(value[0], torch.Tensor)

    def _leaf(self, value: Any) -> Any:
        if self._is_list(value):
            return list(self._rows(value[0]).unbind(0))
        if not isinstance(value, torch.Tensor):
            return value
        rows = self._rows(value)
        return rows if value.ndim == 0 else rows.flatten(0, 1)

    def _rows(self, value: torch.Tensor) -> torch.Tensor:
        """A value of the first row, for all rows: they are in front. Where it is a view of what the first row has, the
        others are the same views of theirs."""
        if id(value) in self._leading:
            return self._leading[id(value)]
        known = self._led.get(_torch.storage_of(value))
        if known is not None:
            first, rows = next((pair for pair in known if _is_like(value, pair[0])), known[0])
            offset = rows.storage_offset() + int(value.storage_offset()) - int(first.storage_offset())
            return rows.as_strided((self.count, *value.shape), (rows.stride(0), *value.stride()), offset)
        if _torch.storage_of(value) not in self._same:
            raise RowsError(
                f"a result of the size {tuple(value.shape)} is made outside of the model's graph",
                where="cachepass.rows",
                hint="call the model once for each request, in a cachepass.cache_context of its own",
            )
        return value.expand(self.count, *value.shape)


def _is_like(value: torch.Tensor, first: torch.Tensor) -> bool:
    """It is all of it, not a view."""
    return (value.shape, value.stride(), value.storage_offset()) == (
        first.shape,
        first.stride(),
        first.storage_offset(),
    )
