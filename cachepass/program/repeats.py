"""Repeats: where a straight-line graph does the same again and again, as a model's blocks do.

    find_repeats : graph, how it is read -> Repeats, those that save most first

        a = mm(x, w0); b = relu(a)
        c = mm(b, w1); d = relu(c)      ->      Repeat(((a, b), (c, d), (e, f)))
        e = mm(d, w2); f = relu(e)

Two stretches of a graph are the same where their nodes, one by one, have the same operation, the same constants,
values of the same size, strides, offset, type and device, and read each other in the same way. What a stretch reads
from outside may differ, and so do its weights. Neither names nor modules are asked: a block that is cut elsewhere, or
that lost work to dead-code elimination, differs by itself.

Everything here is linear in the graph but for the number of periods that are tried.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx

from ..capture.nodes import operands
from .kept import bytes_in

_PERIODS = 16  # periods tried: those at which most nodes recur
LEAST_SAVED = 24  # nodes that a repeat need not compile again, below which a call is not worth it
_UNABLE = 1 << 60  # what no border can be crossed by, in bytes
Stretch = tuple[fx.Node, ...]


class Reading(Protocol):
    """What has to be known of the nodes of a kind of graph."""

    def value(self, node: fx.Node) -> object:
        """The (fake) value of a node."""
        ...

    def root(self, node: fx.Node) -> fx.Node:
        """The node whose memory a node's value lies in: itself, if it is no view."""
        ...

    def may_move(self, node: fx.Node) -> bool:
        """It may be in a stretch: it does nothing but make values of those that it reads, or write to some."""
        ...

    def written(self, node: fx.Node) -> Sequence[fx.Node]:
        """What a node writes to in place."""
        ...

    def constant(self, node: fx.Node, index: int) -> bool:
        """An argument counts when nodes are compared; one that is a name does not."""
        ...


@dataclass(frozen=True)
class Repeat:
    """Stretches of a graph that are the same, each in the order of the graph; none has a node of another."""

    stretches: tuple[Stretch, ...]

    @property
    def saved(self) -> int:
        """Nodes that need not be compiled again."""
        return (len(self.stretches) - 1) * len(self.stretches[0])


def find_repeats(graph: fx.Graph, reading: Reading) -> list[Repeat]:
    """The repeats of a graph."""
    line = _Line(graph, reading)
    found: list[Repeat] = []
    free = [range(len(line.nodes))]
    while (run := _longest(line, free)) is not None:
        starts = _starts(line, run, free)
        free = _without(free, starts, run.stretch)
        for stretches in _alike([tuple(line.nodes[i : i + run.stretch]) for i in starts], reading):
            repeat = Repeat(stretches)
            if repeat.saved >= LEAST_SAVED:
                found.append(repeat)
    return sorted(found, key=lambda repeat: repeat.saved, reverse=True)


# ---- a graph as a line of words -------------------------------------------------------------------------------------


class _Line:
    """The nodes that may be in a stretch, in order, and for each a number that says what it does."""

    def __init__(self, graph: fx.Graph, reading: Reading) -> None:
        self.reading = reading
        self.nodes = [node for node in graph.nodes if reading.may_move(node)]
        self.root = [reading.root(node) for node in self.nodes]
        known: dict[Hashable, int] = {}
        self.words = [known.setdefault(_word(node, reading), len(known)) for node in self.nodes]
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.last_use: dict[fx.Node, int] = {}  # of what owns its memory: the last node that reads it, or a view of it
        for node, root in zip(self.nodes, self.root, strict=True):
            uses = [self.index.get(user, 0) for user in node.users]
            self.last_use[root] = max(self.last_use.get(root, 0), *uses, 0)

    def crossing(self, at: int, since: int) -> int:
        """Bytes made from index ``since`` on that are read from index ``at`` on."""
        made = [node for node, root in zip(self.nodes[since:at], self.root[since:at], strict=True) if node is root]
        values = [self.reading.value(node) for node in made if self.last_use.get(node, 0) >= at]
        return sum(bytes_in(value) if isinstance(value, torch.Tensor) else _UNABLE for value in values)


def _word(node: fx.Node, reading: Reading) -> Hashable:
    args = [_literal(arg, reading) if reading.constant(node, i) else None for i, arg in enumerate(node.args)]
    return (node.op, node.target, *args, _literal(node.kwargs, reading), _kind(reading.value(node)))


def _literal(value: object, reading: Reading) -> Hashable:
    """An argument; of one that is a node only what kind of value it has."""
    if isinstance(value, fx.Node):
        return ("node", _kind(reading.value(value)))
    if isinstance(value, (tuple, list)):
        return (type(value), *(_literal(item, reading) for item in value))
    if isinstance(value, dict):
        return tuple((key, _literal(item, reading)) for key, item in value.items())
    if isinstance(value, slice):
        return ("slice", *(_literal(item, reading) for item in (value.start, value.stop, value.step)))
    return (type(value), repr(value) if isinstance(value, float) or not isinstance(value, Hashable) else value)


def _kind(value: object) -> Hashable:
    if isinstance(value, torch.Tensor):
        sizes = (*value.shape, *value.stride(), value.storage_offset())
        return (type(value), value.ndim, value.dtype, value.device, *map(str, sizes))
    if isinstance(value, (tuple, list)):
        return (type(value), *map(_kind, value))
    return (type(value), str(value))


# ---- what recurs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """From index ``start`` on, ``length`` words, each of which is that of ``period`` before (but for the first ones).

    What is left over behind the last whole period may be most of one, as where the last block lacks its end. Then
    stretches are as long as that, one more of them, and the rest of each period stays between them.
    """

    start: int
    length: int
    period: int

    @property
    def count(self) -> int:
        """How many stretches there are."""
        whole, spare = divmod(self.length, self.period)
        return whole + 1 if whole * spare > (whole - 1) * self.period else whole

    @property
    def stretch(self) -> int:
        """How many nodes a stretch has."""
        whole, spare = divmod(self.length, self.period)
        return spare if self.count > whole else self.period

    @property
    def saved(self) -> int:
        return (self.count - 1) * self.stretch


def _longest(line: _Line, free: Sequence[range]) -> _Run | None:
    """The run that saves most."""
    runs = [run for part in free for period in _periods(line, part) for run in _runs(line, part, period)]
    best = max(runs, key=lambda run: (run.saved, -run.period), default=None)
    return best if best is not None and best.saved >= LEAST_SAVED else None


def _periods(line: _Line, part: range) -> list[int]:
    """The distances at which most words recur."""
    last: dict[int, int] = {}
    gaps: Counter[int] = Counter()
    for i in part:
        word = line.words[i]
        if word in last:
            gaps[i - last[word]] += 1
        last[word] = i
    return [period for period, _ in gaps.most_common(_PERIODS)]


def _runs(line: _Line, part: range, period: int) -> Iterator[_Run]:
    start = part.start
    for i in range(part.start, part.stop):
        if i + period < part.stop and line.words[i] == line.words[i + period]:
            continue
        if i - start >= period:
            yield _Run(start, i + period - start, period)
        start = i + 1


def _starts(line: _Line, run: _Run, free: Sequence[range]) -> list[int]:
    """Where stretches begin: those of the run, and further ones that are spelled alike elsewhere.

    The run may have some nodes more than its stretches. Of the places where the first may then begin, the best is that
    at which fewest bytes go from one stretch to the next.
    """
    size = run.stretch
    spare = run.length - (run.count - 1) * run.period - size
    begins = range(run.start, run.start + spare + 1)
    begin = min(begins, key=lambda at: line.crossing(at + size, at))
    starts = [begin + k * run.period for k in range(run.count)]
    spelled = line.words[begin : begin + size]
    for part in _without(free, starts, size):
        at = part.start
        while at + size <= part.stop:
            if line.words[at] == spelled[0] and line.words[at : at + size] == spelled:
                starts.append(at)
                at += size
            else:
                at += 1
    return sorted(starts)


def _without(free: Iterable[range], starts: Sequence[int], size: int) -> list[range]:
    """What remains of the free parts when stretches are taken out."""
    for start in starts:
        cut = [(range(p.start, min(p.stop, start)), range(max(p.start, start + size), p.stop)) for p in free]
        free = [part for pair in cut for part in pair if len(part) > 0]
    return list(free)


# ---- the same, and free to move -------------------------------------------------------------------------------------


def _alike(stretches: Sequence[Stretch], reading: Reading) -> Iterator[tuple[Stretch, ...]]:
    """Those of the stretches, spelled alike, that also read each other in the same way."""
    wired: dict[Hashable, list[Stretch]] = {}
    for stretch in stretches:
        if _closed(stretch, reading):
            wired.setdefault(_wiring(stretch), []).append(stretch)
    for same in wired.values():
        if len(same) > 1:
            yield tuple(same)


def _wiring(stretch: Stretch) -> Hashable:
    """For every operand of every node, which node of the stretch it is, if any."""
    inside = {node: i for i, node in enumerate(stretch)}
    return tuple(tuple(inside.get(source, -1) for source in operands(node)) for node in stretch)


def _closed(stretch: Stretch, reading: Reading) -> bool:
    """The stretch can run as a whole where its last node stands, on tensors, and gives tensors.

    It may write to no memory but what it makes. Nodes that stand between its own, and read it or write, run behind it
    then; so it may read none of those, and neither may write what the other reads.
    """
    inside, behind = set(stretch), set[fx.Node]()
    written_inside = {reading.root(target) for node in stretch for target in reading.written(node)}
    written_behind = set[fx.Node]()
    if not written_inside <= inside:
        return False
    for node in _between(stretch):
        sources = operands(node)
        if node in inside:
            if any(source in behind or reading.root(source) in written_behind for source in sources):
                return False
            if not all(s in inside or isinstance(reading.value(s), torch.Tensor) for s in sources):
                return False
        elif reading.written(node) or any(s in inside or s in behind for s in sources):
            if any(reading.root(source) in written_inside for source in sources):
                return False
            behind.add(node)
            written_behind.update(map(reading.root, reading.written(node)))
    return all(
        isinstance(reading.value(node), torch.Tensor) or all(user in inside for user in node.users) for node in stretch
    )


def _between(stretch: Stretch) -> Iterator[fx.Node]:
    node = stretch[0]
    while node is not stretch[-1]:
        yield node
        node = node.next
    yield node
