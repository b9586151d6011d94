"""Roles: what the host gives to each placeholder behind the model's own, and what a program returns for the host."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Predicate:
    """Whether a group is predicted."""

    group: str


@dataclass(frozen=True)
class Weights:
    """The weights of a group's forecast."""

    group: str


@dataclass(frozen=True)
class Parameters:
    """The parameters of the probe's transform."""

    group: str


@dataclass(frozen=True)
class Limit:
    """The bound of a decision that the program takes, as numbers."""

    group: str


@dataclass(frozen=True)
class History:
    """An output of a cut that was kept, by age: 0 is the newest."""

    group: str
    cut: int
    age: int


@dataclass(frozen=True)
class Next:
    """The slot that a step writes; or, returned, the value for it. ``shared``: its memory is something else's too."""

    group: str
    cut: int
    shared: bool = False


@dataclass(frozen=True)
class Output:
    """What is kept of the model's output, by name."""

    group: str
    name: str


@dataclass(frozen=True)
class ProbeSlot:
    """The value that a decision compares with; or, returned, the one for the next step."""

    group: str


@dataclass(frozen=True)
class Invariant:
    """A value that is kept for a run, by name."""

    name: str
    group: str = ""


@dataclass(frozen=True)
class Carried:
    """A value that the program up to the decision computed, by name."""

    name: str
    group: str = ""


@dataclass(frozen=True)
class Distance:
    """Returned: what the host decides by."""

    group: str


@dataclass(frozen=True)
class Verdict:
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
