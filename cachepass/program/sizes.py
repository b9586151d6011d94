"""Sizes: what the symbolic sizes of slots are in a call, from the shapes of its inputs.

    SymbolBinder.of : the inputs' symbolic values, sizes of slots -> where each symbol stands among the inputs

A symbol of a slot's size need not be the whole size of an input: where Dynamo learns that one size is twice another, or
the sum of two, inputs carry the expression. What is linear in one unknown symbol tells that symbol.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CachepassError

if TYPE_CHECKING:
    import sympy

    Bound = dict[sympy.Symbol, int]
Read = Callable[[Sequence[Any]], int]


@dataclass(frozen=True)
class _Solved:
    """A symbol of which an input carries ``factor * symbol + rest``."""

    symbol: sympy.Symbol
    read: Read
    factor: Any
    rest: Any

    def value(self, inputs: Sequence[Any], bound: Bound) -> int:
        return int((self.read(inputs) - self.rest.xreplace(bound)) / self.factor.xreplace(bound))


class SymbolBinder:
    """Finds the values of the symbols in given sizes from the inputs of a call.

    Args:
        plain: Symbols that are a size of an input, or an input.
        solved: Those that stand in expressions, in an order in which each needs only earlier ones.
        needed: The symbols of the sizes, whose values tell calls of different sizes apart.
    """

    def __init__(
        self, plain: Mapping[sympy.Symbol, Read], solved: Sequence[_Solved], needed: set[sympy.Symbol]
    ) -> None:
        self._plain, self._solved = dict(plain), tuple(solved)
        self._reads = tuple(read for symbol, read in plain.items() if symbol in needed)
        self._solves = any(one.symbol in needed for one in solved)

    @staticmethod
    def of(values: Sequence[object], sizes: Iterable[object]) -> SymbolBinder:
        """A binder for ``sizes``, given the fake inputs of their graph.

        Raises:
            CachepassError: The inputs do not tell a size.
        """
        needed = {symbol for size in sizes for symbol in symbols_of(size)}
        if not needed:
            return SymbolBinder({}, (), needed)
        plain: dict[sympy.Symbol, Read] = {}
        others: list[tuple[Any, Read]] = []
        for size, read in _places(values):
            expr = size.node.expr
            if expr.is_Symbol:
                plain.setdefault(expr, read)
            else:
                others.append((expr.expand(), read))
        solved = _solve(set(plain), others)
        unknown = needed - plain.keys() - {one.symbol for one in solved}
        if unknown:
            raise CachepassError(
                f"no input tells the size {', '.join(sorted(map(str, unknown)))} of a value to be kept",
                where="torch.compile",
                hint="compile with dynamic=False",
            )
        return SymbolBinder(plain, solved, needed)

    def key(self, inputs: Sequence[Any]) -> tuple[int, ...]:
        """Equal for calls in which all sizes are the same; asked on every call."""
        if self._solves:
            return tuple(self._bind(inputs).values())
        return tuple([read(inputs) for read in self._reads])

    def resolver(self, inputs: Sequence[Any]) -> Callable[[object], int]:
        """What each size is in a call. All symbols of the inputs are bound, because the compiler may have learned since
        the capture that a symbol of a size is made of others."""
        return functools.partial(resolve_size, bound=self._bind(inputs))

    def _bind(self, inputs: Sequence[Any]) -> Bound:
        bound = {symbol: read(inputs) for symbol, read in self._plain.items()}
        for one in self._solved:
            bound[one.symbol] = one.value(inputs, bound)
        return bound


def symbols_of(size: object) -> set[sympy.Symbol]:
    """The symbols in a size."""
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def resolve_size(size: object, bound: Bound) -> int:
    if isinstance(size, torch.SymInt):
        return int(size.node.expr.xreplace(bound))
    assert isinstance(size, int)
    return size


def _places(values: Sequence[object]) -> Iterator[tuple[torch.SymInt, Read]]:
    """The symbolic numbers among the inputs, then their sizes, then their strides, and how each is read."""
    tensors = [(i, value) for i, value in enumerate(values) if isinstance(value, torch.Tensor)]
    for i, value in enumerate(values):
        if isinstance(value, torch.SymInt):
            yield value, functools.partial(_number, i)
    for i, value in tensors:
        sizes = enumerate(value.shape)
        yield from ((s, functools.partial(_size, i, d)) for d, s in sizes if isinstance(s, torch.SymInt))
    for i, value in tensors:
        strides = enumerate(value.stride())
        yield from ((s, functools.partial(_stride, i, d)) for d, s in strides if isinstance(s, torch.SymInt))


def _number(index: int, inputs: Sequence[Any]) -> int:
    return int(inputs[index])


def _size(index: int, dim: int, inputs: Sequence[Any]) -> int:
    return int(inputs[index].shape[dim])


def _stride(index: int, dim: int, inputs: Sequence[Any]) -> int:
    return int(inputs[index].stride(dim))


def _solve(known: set[sympy.Symbol], expressions: Sequence[tuple[Any, Read]]) -> list[_Solved]:
    """One symbol from each expression in which it is the only unknown one, until nothing more is learned."""
    found: list[_Solved] = []
    before = -1
    while len(found) != before:
        before = len(found)
        for expr, read in expressions:
            unknown = expr.free_symbols - known
            if len(unknown) != 1:
                continue
            (symbol,) = unknown
            rest, term = expr.as_independent(symbol, as_Add=True)
            factor = term / symbol
            if not factor.has(symbol):
                found.append(_Solved(symbol, read, factor, rest))
                known.add(symbol)
    return found
