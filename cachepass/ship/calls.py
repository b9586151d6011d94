"""Calls of a loaded model: what is given is checked and put in order, what comes back is put together."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import ArchiveError
from ..run.dispatch import Dispatcher
from .manifest import Argument, Constant, Form, Given, Items, Path, Result, Size, Template, Weight, dotted, lie_alike

_ALIGNMENT = 16  # bytes: programs read vectors of so many at a time
_Reason = tuple[str, str]  # where, and what


class Attributes(dict[str, Any]):
    """Values by name or by attribute."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class ModelOutput(Attributes):
    """What a model returns that has named fields: by attribute, by name, or by position, as diffusers' outputs."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None."""
        return tuple(value for value in self.values() if value is not None)


class SizeRun:
    """Calls with inputs of one size, by the dispatcher of its programs."""

    def __init__(self, root: torch.nn.Module, size: Size, dispatcher: Dispatcher) -> None:
        self._dispatcher, self.size = dispatcher, size
        self._arguments = [(i, one) for i, one in enumerate(size.inputs) if isinstance(one, Argument)]
        weights = [(i, one) for i, one in enumerate(size.inputs) if isinstance(one, Weight)]
        self._weights = [one for _, one in weights]
        self._places = [i for i, _ in weights]
        self._holders = [_holder(root, one) for one in self._weights]
        self._fixed = dict(size.fixed)
        self._paths = {one.path for _, one in self._arguments} | self._fixed.keys()
        self._count = len(size.inputs)
        self._known: list[torch.Tensor] = []
        self._addresses: list[int] = []
        self._copies: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}
        self._make = _maker(size.output)

    def why_not(self, leaves: Mapping[Path, Any]) -> _Reason | None:
        """Why it cannot take a call that gives these; None: it can."""
        for _, argument in self._arguments:
            reason = _differs(argument, leaves.get(argument.path))
            if reason is not None:
                return f"argument {argument.name}", reason
        for path, value in self._fixed.items():
            given = leaves.get(path)
            if isinstance(given, torch.Tensor) or given != value:
                shown = "a tensor" if isinstance(given, torch.Tensor) else repr(given)
                return f"argument {dotted(path)}", f"it was {value!r} when the model was exported, and is {shown}"
        if len(leaves) > len(self._paths):
            path = next((path for path in leaves if path not in self._paths and leaves[path] is not None), None)
            if path is not None:
                return f"argument {dotted(path)}", "it was not given when the model was exported"
        return None

    def require_weights(self) -> None:
        """Raise an ArchiveError unless the weights fit."""
        self._current_weights()

    def __call__(self, leaves: Mapping[Path, Any]) -> Any:
        inputs: list[Any] = [None] * self._count
        for i, weight in zip(self._places, self._current_weights(), strict=True):
            inputs[i] = weight
        for i, argument in self._arguments:
            value = leaves[argument.path]
            if argument.number:
                inputs[i] = torch.tensor(value, dtype=argument.form.dtype)
            else:
                inputs[i] = value if lies_as(value, argument.form) else self._copy(i, value, argument.form)
        return self._make(self._dispatcher(*inputs), leaves)

    def _current_weights(self) -> list[torch.Tensor]:
        """The model's weights as they are now. Those that were replaced are checked."""
        weights = [holder[name] for holder, name in self._holders]
        same = len(self._known) == len(weights) and all(map(operator.is_, weights, self._known))
        if not same or list(map(torch.Tensor.data_ptr, weights)) != self._addresses:
            self._known, self._addresses = [], []
            for weight, value in zip(self._weights, weights, strict=True):
                require_form(weight, value)
            self._known, self._addresses = weights, list(map(torch.Tensor.data_ptr, weights))
        return weights

    def _copy(self, index: int, value: torch.Tensor, form: Form) -> torch.Tensor:
        """A copy that lies in memory as programs expect it: the same one, while the argument is the same tensor and
        nobody wrote to it."""
        version = -1 if value.is_inference() else value._version
        known = self._copies.get(index)
        if known is not None and known[0] is value and known[1] == version >= 0:
            return known[2]
        copy = laid_out(value, form)
        self._copies[index] = value, version, copy
        return copy


def answer(runs: Sequence[SizeRun], leaves: Mapping[Path, Any], where: str = "") -> Any:
    """What the model returns in a call, by the run that takes it; ``where`` is for messages.

    Raises:
        ArchiveError: None does.
    """
    reasons = []
    for run in runs:
        reason = run.why_not(leaves)
        if reason is None:
            with torch.no_grad():
                return run(leaves)
        reasons.append(reason)
    place, what = reasons[0]
    sizes = "; ".join(str(run.size) for run in runs)
    raise ArchiveError(what, where=where + place, hint=f"export it with shapes=[...] that have it. There are: {sizes}")


def _differs(argument: Argument, value: Any) -> str | None:
    """Why a value cannot be an argument."""
    form = argument.form
    if argument.number:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return None if is_number else f"expected a number, got a {type(value).__name__}"
    if not isinstance(value, torch.Tensor):
        return f"expected a tensor of {form}, got {value!r}"
    return None if form.is_of(value) else f"expected a tensor of {form}, got one of {Form.of(value)}"


def require_kind(weight: Weight, value: Any) -> None:
    """Raise an ArchiveError unless a value is a tensor of a weight's shape, dtype and device."""
    form = weight.form
    if not isinstance(value, torch.Tensor):
        raise ArchiveError(f"it is {value!r}", where=f"weight {weight.name}", hint=f"give a tensor of {form}")
    if not form.is_of(value):
        raise ArchiveError(f"expected {form}, got {Form.of(value)}", where=f"weight {weight.name}")


def require_form(weight: Weight, value: Any) -> None:
    """Raise an ArchiveError unless a tensor can be a weight as it lies."""
    require_kind(weight, value)
    if not lies_as(value, weight.form):
        raise ArchiveError(
            f"its strides are {value.stride()}, and not {weight.form.stride}; or it does not begin at a multiple of "
            f"{_ALIGNMENT} bytes",
            where=f"weight {weight.name}",
            hint="give a contiguous copy",
        )


def lies_as(value: torch.Tensor, form: Form) -> bool:
    """A tensor of a form's shape lies in memory as programs expect it."""
    return not value.data_ptr() % _ALIGNMENT and lie_alike(value.stride(), form.stride, form.shape)


def laid_out(value: torch.Tensor, form: Form) -> torch.Tensor:
    """A copy with a form's strides."""
    return torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device=value.device).copy_(value)


def _holder(root: torch.nn.Module, weight: Weight) -> tuple[dict[str, Any], str]:
    path, _, name = weight.name.rpartition(".")
    module = root.get_submodule(path)
    return (module._parameters if weight.kind == "parameter" else module._buffers), name


def _maker(template: Template) -> Callable[[Sequence[Any], Mapping[Path, Any]], Any]:
    """What a model returns, of its graph's results and the arguments of the call."""
    if isinstance(template, Result):
        index = template.index
        return lambda results, _: results[index]
    if isinstance(template, Given):
        path = template.path
        return lambda _, leaves: leaves[path]
    if isinstance(template, Constant):
        value = template.value
        return lambda _, __: value
    makers = [_maker(item) for item in template.items]
    if isinstance(template, Items):
        kind = list if template.is_list else tuple
        return lambda results, leaves: kind([make(results, leaves) for make in makers])
    names = template.names
    of = ModelOutput if template.kind else dict
    return lambda results, leaves: of(zip(names, [make(results, leaves) for make in makers], strict=True))
