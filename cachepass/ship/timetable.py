"""The timetable of a run: which program runs in each step, and with what, for hosts that know no schedule.

    cachepass 1
    steps 50
    input 0 weight pos_embed.proj.weight float32 128 1 4 4 | 16 16 4 1
    input 1 argument hidden_states float32 2 1 28 28 | 784 784 28 1
    slot 0 float32 2 49 128 | 6272 128 1
    program compute 62
    call compute.block 1 4 5 -> 62 63
    view 62 64 98 128 | 128 1 | 0
    copy 64 60
    results 63
    adopting 61
    end
    step compute slot 0 slot 1
    step predict numbers float32 2 1.5 -0.5 slot 1 slot 0

Inputs are the model's own, by their numbers; each program takes them first, then what its step names: a slot, or
numbers as a tensor. A program's lines are what is done with its values (``listing.py``): results get the numbers behind
its inputs, a value of ``adopting`` takes the place of a slot, and ``once`` stands for the program that fills slots when
a run begins. All sizes are in elements. It is made by the dispatcher itself, on memory that is not there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ..method import Method
from ..options import CompileOptions
from ..program.runnable import LoweredVariant
from ..run.context import cache_context
from .listing import numbers_of
from .loaded import LoadedProgram, dispatcher_of
from .manifest import Argument, Form, Shipped, Size

_META = torch.device("meta")
_BOUNDLESS = 2**62


def why_none(size: Size, method: Method, options: CompileOptions) -> str | None:
    """Why there can be no timetable; None: there is one."""
    if options.num_inference_steps is None:
        return 'the length of a run is not known: give options={"num_inference_steps": ...}'
    if method.recipe.decider is not None:
        return "which steps are predicted is decided in the run, from what is computed"
    if method.guidance is not None:
        return "which branches are computed depends on how the model is called"
    if method.needs_timestep or method.needs_model:
        return "it depends on the timesteps of a run"
    return None if size.half is None else "it has programs of two batch sizes"


def timetable(size: Size, method: Method, options: CompileOptions) -> str:
    """The timetable of a run of ``options.num_inference_steps`` steps, of a method that has one (``why_none``)."""
    steps = options.num_inference_steps
    assert steps is not None
    rehearsal = _Rehearsal(size, method, options)
    lines = ["cachepass 1", f"steps {steps}"]
    for i, source in enumerate(size.inputs[k] for k in size.binding.inputs):
        kind = "argument" if isinstance(source, Argument) else "weight"
        lines.append(f"input {i} {kind} {source.name} {_form(source.form)}")
    called = [line for i in range(steps) for line in rehearsal.step(i, steps)]
    for i, slot in enumerate(rehearsal.slots):
        lines.append(f"slot {i} {_form(Form.of(slot))}")
    used = {line.split()[1] for line in called}
    for one in size.programs:
        if one.name in used:
            lines += one.listing.lines()
    return "\n".join((*lines, *called)) + "\n"


def _form(form: Form) -> str:
    dtype = str(form.dtype).removeprefix("torch.")
    return f"{dtype} {numbers_of(form.shape)}| {numbers_of(form.stride)}".rstrip()


class _Noting(LoadedProgram):
    """A program that runs nothing, and writes down what it is given."""

    def __init__(self, size: Size, method: Method, rehearsal: _Rehearsal) -> None:
        self._rehearsal = rehearsal
        super().__init__(size, {}, method)

    def make_variant(self, shipped: Shipped) -> LoweredVariant:
        results = len(shipped.listing.results) - len(shipped.listing.adopting)

        def run(given: list[Any]) -> list[Any]:
            own = len(given) - len(shipped.roles) if shipped.roles else len(given)
            self._rehearsal.note(shipped.name, given[own:])
            return [torch.empty(0)] * results

        return LoweredVariant.of(shipped.name, run, shipped.roles, shipped.kept, 0.0)

    def device_tensor(
        self,
        name: str,
        numbers: tuple[float, ...],
        dtype: torch.dtype,
        device: torch.device,  # noqa: ARG002 (there is no memory on it)
    ) -> torch.Tensor:
        tensor = super().device_tensor(name, numbers, dtype, torch.device("cpu"))
        self._rehearsal.numbers[id(tensor)] = tensor
        return tensor


class _Rehearsal:
    """A run on memory that is not there."""

    def __init__(self, size: Size, method: Method, options: CompileOptions) -> None:
        self.slots: list[torch.Tensor] = []
        self.numbers: dict[int, torch.Tensor] = {}
        self._lines: list[str] = []
        self._size = size
        self._root = torch.nn.Module()
        unmade = _without_memory(size)
        options = dataclasses.replace(options, max_cache_bytes=_BOUNDLESS)
        self._dispatcher = dispatcher_of(unmade, _Noting(unmade, method, self), method, options, self._root)
        self._held = [_empty(source.form) for source in size.inputs]

    def note(self, name: str, given: Sequence[torch.Tensor]) -> None:
        """A program is given these behind the model's own inputs."""
        self._lines.append(f"step {name} {' '.join(map(self._name, given))}".rstrip())

    def _name(self, value: torch.Tensor) -> str:
        if id(value) in self.numbers:
            numbers = " ".join(repr(number) for number in value.tolist())
            return f"numbers {str(value.dtype).removeprefix('torch.')} {value.numel()} {numbers}"
        known = next((i for i, slot in enumerate(self.slots) if slot is value), None)
        if known is None:
            known = len(self.slots)
            self.slots.append(value)
        return f"slot {known}"

    def step(self, index: int, steps: int) -> list[str]:
        """The lines of a step."""
        inputs = list(self._held)
        layout = self._size.layout
        for i in layout.latents:
            inputs[i] = _empty(self._size.inputs[i].form)
        if layout.timestep is not None:
            form = self._size.inputs[layout.timestep].form
            inputs[layout.timestep] = torch.full(form.shape, 1000 * (1 - index / steps)).to(form.dtype)
        self._lines.clear()
        with cache_context("timetable"):
            self._dispatcher(*inputs)
        return list(self._lines)


def _empty(form: Form) -> torch.Tensor:
    return torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device=_META)


def _without_memory(size: Size) -> Size:
    """The same, with all that is kept on no device."""
    plan = size.plan
    cuts = tuple(dataclasses.replace(cut, device=_META) for cut in plan.cuts)
    kept = size.kept
    if kept is not None:
        kept = dataclasses.replace(kept, slots=tuple(dataclasses.replace(slot, device=_META) for slot in kept.slots))
    return dataclasses.replace(size, plan=dataclasses.replace(plan, cuts=cuts), kept=kept)
