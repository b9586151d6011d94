"""Roles: what the host gives to each placeholder behind the model's own, and what a program returns for the host."""

from __future__ import annotations

from dataclasses import dataclass

from ..recipe.value import Value


@dataclass(frozen=True)
class Predicate(Value):
    """Whether a group is predicted."""

    group: str


@dataclass(frozen=True)
class Weights(Value):
    """The weights of a group's forecast."""

    group: str


@dataclass(frozen=True)
class Parameters(Value):
    """The parameters of the probe's transform."""

    group: str


@dataclass(frozen=True)
class Limit(Value):
    """The bound of a decision that the program takes, as numbers."""

    group: str


@dataclass(frozen=True)
class History(Value):
    """An output of a cut that was kept, by age: 0 is the newest."""

    group: str
    cut: int
    age: int


@dataclass(frozen=True)
class Next(Value):
    """The slot that a step writes; or, returned, the value for it. ``shared``: its memory is something else's too."""

    group: str
    cut: int
    shared: bool = False


@dataclass(frozen=True)
class Output(Value):
    """What is kept of the model's output, by name."""

    group: str
    name: str


@dataclass(frozen=True)
class ProbeSlot(Value):
    """The value that a decision compares with; or, returned, the one for the next step."""

    group: str


@dataclass(frozen=True)
class Invariant(Value):
    """A value that is kept for a run, by name."""

    name: str
    group: str = ""


@dataclass(frozen=True)
class Carried(Value):
    """A value that the program up to the decision computed, by name."""

    name: str
    group: str = ""


@dataclass(frozen=True)
class Distance(Value):
    """Returned: what the host decides by."""

    group: str


@dataclass(frozen=True)
class Verdict(Value):
    """Returned: what the program decided, and the distance."""

    group: str


Role = (
    Predicate
    | Weights
    | Parameters
    | Limit
    | History
    | Next
    | Output
    | ProbeSlot
    | Invariant
    | Carried
    | Distance
    | Verdict
)
