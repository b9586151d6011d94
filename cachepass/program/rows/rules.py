"""Row rules: what an operation on one request becomes on several, whose values stand one behind the other.

    rule : operation's arguments, with rows in front where a value has them -> the same for all rows

        mm(x, w)            x [m, k]    ->    view(mm(view(x, [r * m, k]), w), [r, m, n])      x [r, m, k]
        permute(x, [1, 0])              ->    permute(x, [0, 2, 1])
        mul(x, y)           y without   ->    mul(x, y)                                         y broadcasts

A matrix product, an attention and a convolution take all rows in one call, as many calls as for one request. An
operation without a rule is mapped by ``torch.vmap``, one by one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ... import _torch
from ...capture.nodes import arguments_of
from ..emit import CONVERT, TO_THE_END, Emitter, aten


class RowsEmitter:
    """Writes operations on rows.

    Attributes:
        emit: Writes nodes.
        rows: How many there are.
        led: The nodes that have rows in front (of a tuple of values: all of them).
    """

    def __init__(self, emit: Emitter, rows: int) -> None:
        self.emit, self.rows = emit, rows
        self.led: set[fx.Node] = set()

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A node whose value has rows in front."""
        node = self.emit(target, *args, **kwargs)
        self.led.add(node)
        return node

    def is_led(self, value: object) -> bool:
        return isinstance(value, fx.Node) and value in self.led

    def shape(self, value: fx.Node) -> tuple[Any, ...]:
        """The shape of one row."""
        shape = tuple(value.meta["val"].shape)
        return shape[1:] if value in self.led else shape

    def ndim(self, value: fx.Node) -> int:
        return len(self.shape(value))

    def view(self, value: fx.Node, shape: Sequence[Any]) -> fx.Node:
        """A value in another shape, rows in front of it; copied where its strides do not allow it."""
        if _viewable(value.meta["val"], (self.rows, *shape), self.emit):
            return self(aten.view.default, value, [self.rows, *shape])
        copy = self.emit(aten.clone.default, value, memory_format=torch.contiguous_format)
        return self(aten.view.default, copy, [self.rows, *shape])

    def lead(self, value: fx.Node) -> fx.Node:
        """A value with rows in front: one that is the same for all of them is expanded."""
        if value in self.led:
            return value
        shape = self.shape(value)
        first = self.emit(aten.unsqueeze.default, value, 0)
        return self(aten.expand.default, first, [self.rows, *shape])

    def aligned(self, value: fx.Node, ndim: int) -> fx.Node:
        """A value with rows in front whose row has ``ndim`` dimensions, so that rows do not meet another dimension."""
        missing = ndim - self.ndim(value)
        if value not in self.led or missing <= 0:
            return value
        return self.view(value, [1] * missing + list(self.shape(value)))

    def folded(self, value: fx.Node) -> fx.Node:
        """Rows and the first dimension of each as one."""
        value = self.lead(value)
        first, *rest = self.shape(value)
        shape = [self.rows * first, *rest]
        if not _viewable(value.meta["val"], shape, self.emit):
            value = self.emit(aten.clone.default, value, memory_format=torch.contiguous_format)
        return self.emit(aten.view.default, value, shape)

    def unfolded(self, value: fx.Node, first: Any) -> fx.Node:
        return self.view(value, [first, *value.meta["val"].shape[1:]])


Rule = Callable[..., Any]
_RULES: dict[Any, Rule] = {}


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(targets, rule))
        return rule

    return add


def on_rows(over: RowsEmitter, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation some of whose arguments have rows in front: the node that stands for it, or for each of its results.

    Raises:
        NotImplementedError: It cannot be done on rows.
    """
    rule = _RULES.get(target)
    if rule is None and _is_attention(target):
        rule = _attention
    result = NotImplemented if rule is None else rule(over, target, *args, **kwargs)
    if result is NotImplemented and _is_pointwise(target):
        result = _pointwise(over, target, *args, **kwargs)
    return _mapped(over, target, args, kwargs) if result is NotImplemented else result


def _viewable(value: torch.Tensor, shape: Sequence[Any], emit: Emitter) -> bool:
    shape = [size.meta["val"] if isinstance(size, fx.Node) else size for size in shape]
    with emit.fake_mode:
        try:
            value.view(*shape)
        except (RuntimeError, ValueError):
            return False
    return True


def _mapped(over: RowsEmitter, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation by ``torch.vmap``, where it has a rule of torch's own."""
    nodes: list[fx.Node] = []
    fx.map_arg((args, kwargs), nodes.append)

    def on_one(*values: torch.Tensor) -> Any:
        given = iter(values)
        own_args, own_kwargs = fx.map_arg((args, kwargs), lambda _: next(given))
        return target(*own_args, **own_kwargs)

    dims = tuple(0 if node in over.led else None for node in nodes)
    try:
        result = over.emit.traced(_torch.mapped(on_one, dims), *nodes)
    except (RuntimeError, ValueError, TypeError) as error:
        raise NotImplementedError(f"{target}: {str(error).strip().splitlines()[0]}") from error
    fx.map_arg(result, over.led.add)
    return result


# ---- operations that take each element by itself --------------------------------------------------------------------


def _is_pointwise(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and (torch.Tag.pointwise in target.tags or target is CONVERT)


def _pointwise(over: RowsEmitter, target: Any, *args: Any, **kwargs: Any) -> Any:
    found: list[fx.Node] = []
    fx.map_arg((args, kwargs), found.append)
    tensors = [node for node in found if isinstance(node.meta["val"], torch.Tensor)]
    ndim = max(map(over.ndim, tensors))
    args, kwargs = fx.map_arg((args, kwargs), lambda node: over.aligned(node, ndim) if node in tensors else node)
    return over(target, *args, **kwargs)


@_rule(aten.copy.default)
def _copy(over: RowsEmitter, _: Any, base: fx.Node, value: fx.Node, *__: Any) -> Any:
    value = over.lead(over.emit.to(value, base.meta["val"].dtype) if value not in over.led else value)
    if value.meta["val"].dtype != base.meta["val"].dtype:
        value = over(CONVERT, value, base.meta["val"].dtype)
    return _expand(over, aten.expand.default, value, list(over.shape(base)))


@_rule(aten.clone.default)
def _clone(over: RowsEmitter, target: Any, value: fx.Node, *, memory_format: Any = torch.preserve_format) -> Any:
    known = memory_format in (torch.preserve_format, torch.contiguous_format)
    return over(target, value, memory_format=memory_format if known else torch.preserve_format)


@_rule(_torch.FORCE_STRIDES)
def _force_strides(_: RowsEmitter, __: Any, value: fx.Node, *___: Any) -> Any:
    return value  # what is kept is written to pages, of which the strides are known


@_rule(aten.embedding.default)
def _embedding(over: RowsEmitter, target: Any, table: fx.Node, indices: fx.Node, *rest: Any) -> Any:
    return NotImplemented if table in over.led else over(target, table, indices, *rest)


@_rule(aten.constant_pad_nd.default, aten.view_as_complex.default, aten.view_as_real.default)
def _from_behind(over: RowsEmitter, target: Any, *args: Any, **kwargs: Any) -> Any:
    return over(target, *args, **kwargs)  # it counts dimensions from the last one


# ---- shapes ---------------------------------------------------------------------------------------------------------


@_rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(over: RowsEmitter, _: Any, value: fx.Node, shape: Sequence[Any]) -> Any:
    return over.view(value, list(shape))


@_rule(aten.permute.default)
def _permute(over: RowsEmitter, target: Any, value: fx.Node, dims: Sequence[int]) -> Any:
    return over(target, value, [0, *(dim % len(dims) + 1 for dim in dims)])


@_rule(aten.unsqueeze.default)
def _unsqueeze(over: RowsEmitter, target: Any, value: fx.Node, dim: int) -> Any:
    return over(target, value, dim % (over.ndim(value) + 1) + 1)


@_rule(
    aten.squeeze.dim, aten.select.int, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default,
    aten.unbind.int, aten.cumsum.default, aten._softmax.default, aten.index_select.default,
)  # fmt: skip
def _along(over: RowsEmitter, target: Any, value: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """Operations along one dimension, wherever it stands among the arguments."""
    given = arguments_of(target, (value, *args), kwargs)
    del given[target._schema.arguments[0].name]
    if value not in over.led or any(map(over.is_led, given.values())):
        return NotImplemented
    given["dim"] = given.get("dim", 0) % max(over.ndim(value), 1) + 1
    ordered = []
    for argument in target._schema.arguments[1:]:
        if argument.name not in given or argument.kwarg_only:
            break
        ordered.append(given.pop(argument.name))
    return over(target, value, *ordered, **given)


@_rule(aten.expand.default)
def _expand(over: RowsEmitter, target: Any, value: fx.Node, sizes: Sequence[Any], **kwargs: Any) -> Any:
    return over(target, over.aligned(value, len(sizes)), [over.rows, *sizes], **kwargs)


@_rule(aten.repeat.default)
def _repeat(over: RowsEmitter, target: Any, value: fx.Node, times: Sequence[Any]) -> Any:
    return over(target, over.aligned(value, len(times)), [1, *times])


@_rule(aten.cat.default)
def _cat(over: RowsEmitter, target: Any, values: Sequence[fx.Node], dim: int = 0) -> Any:
    led = [over.lead(value) for value in values]
    return over(target, led, dim % over.ndim(led[0]) + 1)


@_rule(aten.slice_scatter.default)
def _slice_scatter(
    over: RowsEmitter, target: Any, base: fx.Node, value: fx.Node, dim: int = 0, start: Any = None, end: Any = None,
    step: int = 1,
) -> Any:  # fmt: skip
    dim = dim % over.ndim(base) + 1
    return over(target, over.lead(base), over.lead(value), dim, start, TO_THE_END if end is None else end, step)


@_rule(aten.select_scatter.default)
def _select_scatter(over: RowsEmitter, target: Any, base: fx.Node, value: fx.Node, dim: int, index: Any) -> Any:
    return over(target, over.lead(base), over.lead(value), dim % over.ndim(base) + 1, index)


@_rule(aten.sym_size.int)
def _sym_size(over: RowsEmitter, target: Any, value: fx.Node, dim: int) -> Any:
    return over.emit(target, value, dim % over.ndim(value) + 1)


# ---- sums over dimensions -------------------------------------------------------------------------------------------


@_rule(aten.mean.dim, aten.sum.dim_IntList, aten.var_mean.correction, aten.amax.default, aten.amin.default)
def _reduce(over: RowsEmitter, target: Any, value: fx.Node, dims: Any = None, *rest: Any, **kwargs: Any) -> Any:
    ndim = over.ndim(value)
    if ndim == 0:
        return NotImplemented
    dims = range(ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return over(target, value, [dim % ndim + 1 for dim in dims], *rest, **kwargs)


# ---- products -------------------------------------------------------------------------------------------------------


@_rule(aten.mm.default)
def _mm(over: RowsEmitter, target: Any, left: fx.Node, right: fx.Node) -> Any:
    if right in over.led:
        return over(aten.bmm.default, over.lead(left), right)
    return over.unfolded(over.emit(target, over.folded(left), right), over.shape(left)[0])


@_rule(aten.addmm.default)
def _addmm(over: RowsEmitter, target: Any, bias: fx.Node, left: fx.Node, right: fx.Node, **kwargs: Any) -> Any:
    if bias in over.led or right in over.led or over.ndim(bias) > 1:
        return NotImplemented
    return over.unfolded(over.emit(target, bias, over.folded(left), right, **kwargs), over.shape(left)[0])


@_rule(aten.bmm.default)
def _bmm(over: RowsEmitter, target: Any, left: fx.Node, right: fx.Node) -> Any:
    first = over.shape(left)[0]
    return over.unfolded(over.emit(target, over.folded(left), over.folded(right)), first)


@_rule(aten.convolution.default)
def _convolution(over: RowsEmitter, target: Any, value: fx.Node, weight: fx.Node, bias: Any, *rest: Any) -> Any:
    if weight in over.led or over.is_led(bias):
        return NotImplemented
    return over.unfolded(over.emit(target, over.folded(value), weight, bias, *rest), over.shape(value)[0])


def _is_attention(target: Any) -> bool:
    return "scaled_dot_product" in str(target) and "backward" not in str(target)


def _attention(over: RowsEmitter, target: Any, *args: Any, **kwargs: Any) -> Any:
    """All rows in one batch: query, key, value ``[r * b, heads, tokens, features]``, and a mask if there is one."""
    given = arguments_of(target, args, kwargs)
    batch = over.shape(given["query"])[0]
    for name, value in given.items():
        if not isinstance(value, fx.Node) or not isinstance(value.meta["val"], torch.Tensor):
            continue
        if name in ("query", "key", "value"):
            given[name] = over.folded(value)
        elif name in ("attn_mask", "attn_bias"):
            given[name] = _mask(over, value, batch, over.ndim(given["query"]))
        else:
            return NotImplemented
    ordered = [given.pop(argument.name) for argument in target._schema.arguments[: len(args)]]
    whole = over.emit(target, *ordered, **given)
    results = []
    for i, value in enumerate(whole.meta["val"]):
        result = over.emit(operator.getitem, whole, i)
        is_batch = isinstance(value, torch.Tensor) and value.ndim > 1
        results.append(over.unfolded(result, batch) if is_batch else result)
    return tuple(results)


def _mask(over: RowsEmitter, mask: fx.Node, batch: Any, ndim: int) -> fx.Node:
    """A mask that broadcasts over requests alone does so over rows too."""
    if mask not in over.led:
        shape = over.shape(mask)
        if len(shape) < ndim or shape[0] == 1:
            return mask
        return over.folded(over.lead(mask))
    mask = over.aligned(mask, ndim)
    _, *rest = over.shape(mask)
    return over.folded(over(aten.expand.default, mask, [over.rows, batch, *rest]))
