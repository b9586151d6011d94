"""Evidence: whether two calls are given the same tensors.

Nothing is read from the device. A tensor is the same if it is the same object, or a view of the same memory in the same
form, and was not written to meanwhile (version counter). Memory is known by its storage, which is held weakly: that
keeps the address from being given to another one, but not the memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import _torch


def _nothing() -> None:
    return None


class Seen:
    """A value as it was in a call."""

    __slots__ = ("_form", "_number", "_storage", "_tensor", "_version")

    def __init__(self, value: Any) -> None:
        self._tensor: Callable[[], Any] = _nothing
        self._number = self._storage = self._form = self._version = None
        if not isinstance(value, torch.Tensor):
            self._number = value
        elif value.ndim == 0 and value.device.type == "cpu":
            self._number = value.tolist()  # a number of the caller's
        elif not _torch.is_rewritten(value):
            self._tensor, self._version = weakref.ref(value), _version(value)
            self._storage, self._form = _torch.held_storage(value), _form(value)

    def is_same(self, value: Any) -> bool:
        if self._tensor() is value:
            return value is not None and self._version == _version(value)
        if not isinstance(value, torch.Tensor):
            return self._number is not None and self._number == value
        if self._storage is None:
            return self._number is not None and value.ndim == 0 and self._number == value.tolist()
        return self._form == _form(value) and self._storage.is_of(value) and self._version == _version(value)

    def is_part_with(self, value: Any) -> bool:
        """A view of the same memory, in whatever form, that was not written to meanwhile."""
        if self._storage is None or not isinstance(value, torch.Tensor):
            return False
        return self._version == _version(value) and self._storage.is_of(value)

    @property
    def is_gone(self) -> bool:
        """It was a tensor, and nobody can give it again."""
        return self._storage is not None and self._storage.expired()


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _form(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


@dataclass(eq=False)
class Given:
    """What a call is given.

    Attributes:
        latents: The (first) latents tensor.
        names, values: Of its conditioning: everything but latents, timestep and parameters.
        schedule: What the timestep is a view of, or the timesteps that the pipeline tells.
        step_index: Which step it is, where that is told.
        graph: Which of the model's graphs is called; None where it is many.
    """

    latents: Any
    names: tuple[str, ...]
    values: Sequence[Any]
    schedule: Any = None
    step_index: int | None = None
    graph: object = None


def schedule_of(timestep: Any) -> Any:
    """The tensor that a timestep is a view of: the same one in all steps of a run, where pipelines take it from the
    scheduler's. None: the timestep is no view."""
    return timestep._base if isinstance(timestep, torch.Tensor) else None


class Memory:
    """What the last call of a trajectory was given, at one size of its latents."""

    __slots__ = ("_latents", "_names", "_seen", "graph")

    def __init__(self) -> None:
        self.graph: object = None
        self._names: tuple[str, ...] = ()
        self._seen: list[Seen] = []
        self._latents: Seen | None = None

    def is_same(self, given: Given) -> bool:
        """All of the conditioning is as it was. Asked at every call, so nothing is made here."""
        if self._names is not given.names and self._names != given.names:
            return not self.differences(given)
        for seen, value in zip(self._seen, given.values, strict=True):  # noqa: SIM110 (a generator takes twice as long)
            if not seen.is_same(value):
                return False
        return True

    def differences(self, given: Given) -> list[str]:
        """Names of the inputs that are other tensors. An input that one of the calls has not tells nothing: it is
        not among the inputs of that call's graph."""
        known = dict(zip(self._names, self._seen, strict=True))
        return [
            name
            for name, value in zip(given.names, given.values, strict=True)
            if name in known and not known[name].is_same(value)
        ]

    def has_latents(self, given: Given) -> bool:
        """The latents are those of that call, or another part of the same tensor: it is the same step."""
        return self._latents is not None and self._latents.is_part_with(given.latents)

    def repeats_latents(self, given: Given) -> bool:
        """The latents are those of that call, all of them."""
        return self._latents is not None and self._latents.is_same(given.latents)

    def gone(self, names: Mapping[str, object]) -> bool:
        """One of these inputs does not exist any more, so this call cannot come again."""
        return any(seen.is_gone for name, seen in zip(self._names, self._seen, strict=True) if name in names)

    def keep(self, given: Given, *, same: bool = False) -> None:
        """Remember a call. What is the ``same`` is remembered already."""
        if same:
            pass
        elif self._names == given.names:
            self._seen = [
                seen if seen.is_same(value) else Seen(value)
                for seen, value in zip(self._seen, given.values, strict=True)
            ]
        else:
            self._names, self._seen = given.names, [Seen(value) for value in given.values]
        self.graph = given.graph
        if self._latents is None or not self._latents.is_same(given.latents):
            self._latents = Seen(given.latents)


class Habits:
    """Which inputs of a model stay the same in a trajectory, and which are made anew in every step: learned from its
    calls. An input of the first kind that is another tensor belongs to another trajectory; one of the second kind tells
    nothing."""

    def __init__(self) -> None:
        self.stable: dict[str, None] = {}
        self.fresh: set[str] = set()
        self.same_schedule = False  # timesteps of one run are views of one tensor
        self._settled: Sequence[str] = ()

    def note_same(self, names: Sequence[str]) -> None:
        if names is self._settled:  # asked in every step
            return
        self._settled = names
        for name in names:
            self.stable[name] = None
            self.fresh.discard(name)

    def note_fresh(self, names: Sequence[str]) -> None:
        self._settled = () if names else self._settled
        for name in names:
            self.stable.pop(name, None)
            self.fresh.add(name)

    def unknown(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name not in self.stable and name not in self.fresh]
