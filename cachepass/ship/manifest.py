"""The manifest: everything that an archive says of its programs, as values that are saved as JSON.

It holds numbers, names and the recipe, and no code. A loaded model is called by it: where each input of the graph comes
from in the arguments of a call, which program runs in which phase and with which slots, and what its results are put
into.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..program.plan import PlannedCut
from ..program.roles import Role
from ..program.slots import NamedSlot
from ..recipe.frequency import LatentFormat
from ..recipe.value import Value
from .listing import Listing

SCHEMA = 1  # rises when archives of before would be read as something else
Path = tuple[Any, ...]  # of names and positions: where a value lies in the arguments of a call


@dataclass(frozen=True)
class Form(Value):
    """What a tensor must be."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @staticmethod
    def of(value: torch.Tensor) -> Form:
        return Form(tuple(value.shape), tuple(value.stride()), value.dtype, value.device.type)

    def is_of(self, value: torch.Tensor) -> bool:
        """A tensor has this shape and dtype, on such a device."""
        return value.shape == self.shape and value.dtype == self.dtype and value.device.type == self.device

    @property
    def nbytes(self) -> int:
        """Of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape)) or "a scalar"
        return f"{size} {str(self.dtype).removeprefix('torch.')} on {self.device}"


def lie_alike(one: Sequence[int], other: Sequence[int], shape: Sequence[int]) -> bool:
    """Two strides put the elements of a shape at the same places."""
    return all(a == b for a, b, size in zip(one, other, shape, strict=True) if size > 1)


@dataclass(frozen=True)
class Weight(Value):
    """An input that is a parameter or a buffer of the model.

    Attributes:
        name: In the model.
        form: What it must be.
        kind: ``"parameter"``, ``"buffer"``; ``"constant"``: the model holds it, and no state dict has it, so the
            archive does.
    """

    name: str
    form: Form
    kind: str = "parameter"


@dataclass(frozen=True)
class Argument(Value):
    """An input that a call brings.

    Attributes:
        path: Where it lies in the arguments of a call.
        form: What it must be; of a ``number`` the tensor that is made of it.
        number: The call brings a number of Python's.
    """

    path: Path
    form: Form
    number: bool = False

    @property
    def name(self) -> str:
        return dotted(self.path)


def dotted(path: Path) -> str:
    return ".".join(map(str, path))


@dataclass(frozen=True)
class Parameter(Value):
    """A parameter of the model's ``forward``.

    Attributes:
        kind: As ``inspect.Parameter.kind``.
        default: What a call that leaves it out gives.
        required: A call may not leave it out; or its default cannot be saved.
    """

    name: str
    kind: int
    default: Any = None
    required: bool = True


# ---- what a model returns ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result(Value):
    """A tensor that the graph returns."""

    index: int


@dataclass(frozen=True)
class Given(Value):
    """An argument of the call, returned as it is."""

    path: Path


@dataclass(frozen=True)
class Constant(Value):
    """The same in every call."""

    value: Any


@dataclass(frozen=True)
class Items(Value):
    """A tuple, or a list."""

    items: tuple[Template, ...]
    is_list: bool


@dataclass(frozen=True)
class Fields(Value):
    """A dict, or an object with named fields, as diffusers' outputs are: then ``kind`` is the name of its class."""

    names: tuple[str, ...]
    items: tuple[Template, ...]
    kind: str = ""


Template = Result | Given | Constant | Items | Fields


# ---- what runs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Binding(Value):
    """How a program is called by a graph.

    Attributes:
        inputs: For each of the model's own inputs of the program, which input of the graph it is.
        results: For each result of the graph, which result of the program it is.
    """

    inputs: tuple[int, ...]
    results: tuple[int, ...]


@dataclass(frozen=True)
class HalfBinding(Value):
    """How the half-batch graph is called (``capture.half.HalfCall``), and by it its programs."""

    picks: tuple[tuple[int, bool], ...]
    unconditional_first: bool
    names: tuple[str, ...]
    pairs: tuple[int, ...]
    binding: Binding


@dataclass(frozen=True)
class Kept(Value):
    """What is kept for a run (``program.runnable.Invariants``), by the programs of full or of half batches."""

    slots: tuple[NamedSlot, ...]
    checked: tuple[int, ...]
    regions: tuple[str, ...]
    flops: int | None


@dataclass(frozen=True)
class Shipped(Value):
    """A program of the model: what runs, what it takes behind the model's own inputs, what its last results are.

    ``flops``: of one call; None: unknown.
    """

    listing: Listing
    roles: tuple[Role, ...]
    kept: tuple[Role, ...]
    flops: int | None = None

    @property
    def name(self) -> str:
        return self.listing.name


@dataclass(frozen=True)
class Probed(Value):
    """What a decision looks at; ``parameters``: how many its transform takes."""

    group: str
    every: bool
    parameters: int
    slot: NamedSlot
    residual: bool


@dataclass(frozen=True)
class Guided(Value):
    """What is kept of the model's output for guidance."""

    slots: tuple[NamedSlot, ...]
    latents: LatentFormat
    halved: bool


@dataclass(frozen=True)
class Planned(Value):
    """The plan (``program.plan.CachePlan``)."""

    cuts: tuple[PlannedCut, ...]
    groups: tuple[str, ...]
    probe: Probed | None
    guidance: Guided | None


@dataclass(frozen=True)
class Layout(Value):
    """Where things stand among a graph's inputs (``capture.inputs.InputLayout``)."""

    latents: tuple[int, ...]
    timestep: int | None
    conditioning: tuple[int, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class BlockPart(Value):
    """The programs are those of a class of blocks.

    Attributes:
        class_name: Its name.
        prefix: Path of the block that was captured.
        places: Paths of all blocks that they are called for, and the groups that may be predicted in each.
    """

    class_name: str
    prefix: str
    places: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Size(Value):
    """The programs for inputs of one size.

    Attributes:
        signature: Parameters of the ``forward`` that they stand for.
        part: They are those of a block; None: of the whole model.
        inputs: Of the graph: where they come from.
        fixed: Arguments that are no tensors, which calls must give as the exported one did: paths and values.
        layout: Roles of inputs.
        plan: What is kept.
        binding, half: How programs are called.
        programs: By name: ``"compute"``, ``"predict"``, ``"decide"``, ``"once"``, ...
        kept, kept_half: What is kept for a run.
        names, names_half: What the user calls the model's own inputs of the programs.
        output: What the model returns.
        flops: Of one call without a cache.
    """

    signature: tuple[Parameter, ...]
    part: BlockPart | None
    inputs: tuple[Weight | Argument, ...]
    fixed: tuple[tuple[Path, Any], ...]
    layout: Layout
    plan: Planned
    binding: Binding
    half: HalfBinding | None
    programs: tuple[Shipped, ...]
    kept: Kept | None
    kept_half: Kept | None
    names: tuple[str, ...]
    names_half: tuple[str, ...]
    output: Template
    flops: int | None

    @property
    def arguments(self) -> tuple[Argument, ...]:
        return tuple(source for source in self.inputs if isinstance(source, Argument))

    @property
    def weights(self) -> tuple[Weight, ...]:
        return tuple(source for source in self.inputs if isinstance(source, Weight))

    def __str__(self) -> str:
        return ", ".join(f"{argument.name} {argument.form}" for argument in self.arguments if argument.form.shape)


@dataclass(frozen=True)
class Built(Value):
    """With what an archive was made, and where it runs.

    Attributes:
        cachepass, torch: Versions.
        device: ``"cpu"`` or ``"cuda"``.
        capability: Of the device: vector instructions (``"AVX2"``), or the compute capability (``"9.0"``).
        system: Operating system and processor: ``"Linux x86_64"``.
        model: The model's class.
    """

    cachepass: str
    torch: str
    device: str
    capability: str
    system: str
    model: str


@dataclass(frozen=True)
class Settings(Value):
    """The options that count when programs run (``cachepass.CompileOptions``)."""

    timestep_input: str | None
    timestep_scale: float | None
    num_inference_steps: int | None
    invariant_inputs: tuple[str, ...]
    varying_inputs: tuple[str, ...]
    max_cache_bytes: int | None


@dataclass(frozen=True)
class Stored(Value):
    """A tensor in the archive, and its SHA-256."""

    record: str
    form: Form
    sha256: str


@dataclass(frozen=True)
class Manifest(Value):
    """An archive.

    Attributes:
        built: With what it was made.
        settings: The options.
        sizes: The programs, for each size of inputs.
        hashes: SHA-256 of each record of a program.
        constants: What the model holds and no state dict has, by name.
        weights: The model's weights, if they are inside.
        attributes: The model's configuration, as names and values.
    """

    built: Built
    settings: Settings
    sizes: tuple[Size, ...]
    hashes: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Stored], ...]
    weights: tuple[tuple[str, Stored], ...]
    attributes: tuple[tuple[str, Any], ...]
