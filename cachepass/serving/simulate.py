"""Simulate: a server's throughput and latencies, from arrivals, a scheduler and what calls cost; no model runs.

    arrivals : requests per second, requests  -> (seconds, Request), as Poisson traffic
    simulate : these, a scheduler, costs      -> Simulated

The events are exact: a request is submitted at its second, though the engine hears of it only when the call that runs
then is over; a call takes what it costs; nothing else takes time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .costs import Cost, cost_of
from .requests import Request
from .scheduler import StepScheduler


@dataclass(frozen=True)
class Simulated:
    """What became of the requests.

    Attributes:
        latencies: Seconds from the arrival of each request to its end, in the order of arrival.
        seconds: From the first arrival to the last end.
        busy: Seconds in which the engine was in a call.
        calls: Calls of the engine.
        rows: Steps made, over all calls.
    """

    latencies: tuple[float, ...]
    seconds: float
    busy: float
    calls: int
    rows: int

    @property
    def throughput(self) -> float:
        """Requests per second."""
        return len(self.latencies) / self.seconds if self.seconds else math.inf

    @property
    def rows_per_call(self) -> float:
        """How full calls were."""
        return self.rows / self.calls if self.calls else 0.0

    def percentile(self, share: float) -> float:
        """The latency that ``share`` per cent of the requests do not exceed."""
        ordered = sorted(self.latencies)
        return ordered[max(math.ceil(share / 100 * len(ordered)), 1) - 1]

    def __str__(self) -> str:
        p50, p95, p99 = (self.percentile(share) for share in (50, 95, 99))
        return (
            f"{len(self.latencies)} requests, {self.throughput:.3g} per second; latency p50 {p50:.3g} s, "
            f"p95 {p95:.3g} s, p99 {p99:.3g} s; {self.rows_per_call:.1f} rows in a call"
        )


def arrivals(requests: Iterable[Request], per_second: float, *, seed: int = 0) -> Iterator[tuple[float, Request]]:
    """Poisson traffic: requests that know nothing of each other, so many per second on average; ``math.inf``: all at
    once."""
    generator, now = random.Random(seed), 0.0
    for request in requests:
        now += 0.0 if per_second == math.inf else generator.expovariate(per_second)
        yield now, request


def simulate(
    traffic: Iterable[tuple[float, Request]], scheduler: StepScheduler, cost: Cost, *, per_call: float = 0.0
) -> Simulated:
    """What a server with one engine would do.

    Args:
        traffic: Requests and the seconds at which they arrive, in this order.
        scheduler: A new one.
        cost: Seconds of calling some rows of one phase; the phases of a call run one after the other.
        per_call: Seconds that each call takes besides.
    """
    coming = iter(traffic)
    upcoming = next(coming, None)
    arrived: dict[str, float] = {}
    latencies: dict[str, float] = {}
    first = now = 0.0 if upcoming is None else upcoming[0]
    busy, calls, rows = 0.0, 0, 0
    while upcoming is not None or len(latencies) < len(arrived):
        while upcoming is not None and upcoming[0] <= now:
            arrived[upcoming[1].name] = upcoming[0]
            scheduler.submit(upcoming[1])
            upcoming = next(coming, None)
        call = scheduler.next()
        if not call.rows:
            assert upcoming is not None, "requests that arrived and are not over have rows"
            now = max(now, upcoming[0])
            continue
        taken = per_call + cost_of(call.rows, cost)
        now, busy, calls, rows = now + taken, busy + taken, calls + 1, rows + len(call.rows)
        scheduler.done(call)
        latencies |= {row.name: now - arrived[row.name] for row in call.rows if row.last}
    return Simulated(tuple(latencies[name] for name in arrived), now - first, busy, calls, rows)
