"""Align: two prints of a graph side by side, row by row.

align : lines before, lines after -> runs of rows that are equal, changed, removed or added
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["equal", "changed", "removed", "added"]


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of one kind: where they begin on either side, and how many they are. Removed rows stand on the
    left side alone, added ones on the right."""

    kind: Kind
    left: int
    right: int
    count: int


def align(before: Sequence[str], after: Sequence[str]) -> tuple[Rows, ...]:
    """Rows that cover both texts in order. A line that changed stands beside the one that defines the same name."""
    return tuple(_merged(_rows(before, after)))


def _rows(before: Sequence[str], after: Sequence[str]) -> Iterator[Rows]:
    for tag, i, i_end, j, j_end in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if tag == "equal":
            yield Rows("equal", i, j, i_end - i)
        else:
            yield from _differing(before[i:i_end], after[j:j_end], i, j)


def _differing(before: Sequence[str], after: Sequence[str], i: int, j: int) -> Iterator[Rows]:
    """Rows of two stretches with no line in common: by the names that the lines define."""
    names = [[_name(line) for line in lines] for lines in (before, after)]
    for tag, a, a_end, b, b_end in difflib.SequenceMatcher(None, *names, autojunk=False).get_opcodes():
        if tag == "equal":
            yield Rows("changed", i + a, j + b, a_end - a)
        else:
            yield Rows("removed", i + a, j + b, a_end - a)
            yield Rows("added", i + a_end, j + b, b_end - b)


def _name(line: str) -> str:
    """``add`` of ``add: f32[2, 8] = aten.add.Tensor(x, attn)``; ``return`` of the last line."""
    return line.split(": ", 1)[0] if ": " in line else line.split(" ", 1)[0]


def _merged(rows: Iterator[Rows]) -> Iterator[Rows]:
    """The runs without empty ones, neighbours of one kind made one."""
    last: Rows | None = None
    for run in rows:
        if not run.count:
            continue
        if last is not None and last.kind == run.kind:
            last = Rows(last.kind, last.left, last.right, last.count + run.count)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last
