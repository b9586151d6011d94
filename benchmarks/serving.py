"""A server's throughput and latencies, with and without a cache, from what calls of the real programs cost.

    python benchmarks/serving.py                            # measure, then simulate
    python benchmarks/serving.py --model digits --requests 5000
    python benchmarks/serving.py --costs results/FILE.json  # simulate again with costs measured before

First the seconds of a call are measured, by phase and rows, for the digits model and one of DiT's shape
(``serving_costs.py``). Then the same Poisson traffic, of runs of several lengths, goes to five servers
(``cachepass.serving.simulate``), each with one model on the same processor:

    no cache         plain Inductor, continuous batching: every active request steps in every call
    one at a time    cachepass, each request to its end in a context of its own
    static batches   cachepass, rows that begin together; the next ones when the last is over
    rows             cachepass, rows, StepScheduler as it is
                     (and with twice as many active requests as a call has rows, which takes twice the memory)
    rows, FIFO       the same where every active request steps in every call, whatever its phase

Loads are shares of what the server without a cache can do at most; ``all`` is all requests at once, where the
throughput is the most that a server can do.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from report import Column, markdown, results_path, write
from rich.progress import Progress
from serving_costs import MODELS, WAYS, Costs, measure

from cachepass.serving import (
    CatchUp,
    FirstCome,
    MeasuredCosts,
    Request,
    Simulated,
    StepScheduler,
    Together,
    arrivals,
    simulate,
)


@dataclass(frozen=True)
class Server:
    """One of the five: the programs that it has, and its scheduler for calls of at most so many rows."""

    way: str
    scheduler: Callable[[int, MeasuredCosts], StepScheduler]


def _first_come(rows: int, _: MeasuredCosts) -> StepScheduler:
    return StepScheduler(max_rows=rows, max_active=rows, policy=FirstCome())


SERVERS = {
    "no cache": Server("plain", _first_come),
    "one at a time": Server("alone", lambda _rows, _: StepScheduler(max_rows=1, max_active=1)),
    "static batches": Server(
        "rows", lambda rows, _: StepScheduler(max_rows=rows, max_active=rows, policy=Together(), patience=None)
    ),
    "rows": Server("rows", lambda rows, cost: StepScheduler(max_rows=rows, max_active=rows, policy=CatchUp(cost))),
    "rows, twice the places": Server(
        "rows", lambda rows, cost: StepScheduler(max_rows=rows, max_active=2 * rows, policy=CatchUp(cost))
    ),
    "rows, FIFO": Server("rows", _first_come),
}
COST_COLUMNS: tuple[Column, ...] = (
    ("programs", "way", str), ("phase", "phase", str),
    *((f"{rows} rows ms", str(rows), lambda v: f"{v:.2f}") for rows in (1, 2, 4, 8)),
)  # fmt: skip
COLUMNS: tuple[Column, ...] = (
    ("load", "load", str), ("server", "server", str), ("requests / s", "throughput", lambda v: f"{v:.2f}"),
    ("/ no cache", "ratio", lambda v: f"{v:.2f}"), *((f"p{n} s", f"p{n}", lambda v: f"{v:.2f}") for n in (50, 95, 99)),
    ("rows in a call", "rows", lambda v: f"{v:.1f}"), ("busy %", "busy", lambda v: f"{v:.0f}"),
)  # fmt: skip


def requests_of(phases: dict[int, tuple[str, ...]], count: int, seed: int) -> Iterator[Request]:
    """Runs of these lengths, at random; the same for every server."""
    generator, lengths = random.Random(seed), sorted(phases)
    for index in range(count):
        yield Request(f"request-{index}", phases[generator.choice(lengths)])


def serve(server: Server, costs: Costs, rows: int, per_second: float, count: int, seed: int) -> Simulated:
    cost = MeasuredCosts(dict(costs.tables[server.way]))
    requests = requests_of(costs.phases[server.way], count, seed)
    return simulate(arrivals(requests, per_second, seed=seed), server.scheduler(rows, cost), cost)


def row(load: str, name: str, found: Simulated, base: Simulated) -> dict[str, Any]:
    return {
        "load": load, "server": name, "throughput": found.throughput, "ratio": found.throughput / base.throughput,
        **{f"p{share}": found.percentile(share) for share in (50, 95, 99)},
        "rows": found.rows_per_call, "busy": 100 * found.busy / found.seconds,
    }  # fmt: skip


def compared(costs: Costs, loads: tuple[float, ...], count: int, seed: int) -> list[dict[str, Any]]:
    """Every server under every load, and with all requests at once."""
    rows = max(costs.tables["plain"]["#"])
    most = {name: serve(server, costs, rows, math.inf, count, seed) for name, server in SERVERS.items()}
    found = []
    for load in loads:
        per_second = load * most["no cache"].throughput
        at = {name: serve(server, costs, rows, per_second, count, seed) for name, server in SERVERS.items()}
        title = f"{load:g} ({per_second:.2f} / s)"
        found += [row(title, name, one, at["no cache"]) for name, one in at.items()]
    return found + [row("all", name, one, most["no cache"]) for name, one in most.items()]


def cost_rows(costs: Costs) -> list[dict[str, Any]]:
    return [
        {"way": way, "phase": phase, **{str(rows): 1000 * seconds for rows, seconds in by_rows.items()}}
        for way in WAYS
        for phase, by_rows in costs.tables[way].items()
    ]


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), help="Default: all.")
@click.option("--rows", "sizes", multiple=True, default=(1, 2, 4, 8), show_default=True, help="Rows of a program.")
@click.option("--steps", "lengths", multiple=True, default=(16, 20, 28), show_default=True, help="Of requests.")
@click.option("--load", "loads", multiple=True, default=(0.5, 0.9, 1.5), show_default=True)
@click.option("--requests", "count", default=2000, show_default=True, type=click.IntRange(1), help="In each traffic.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Of measuring.")
@click.option("--seed", default=0, show_default=True)
@click.option("--costs", "saved", default=None, type=click.Path(exists=True, path_type=Path), help="Measured before.")
@click.option("--out", default=None, type=click.Path(path_type=Path), help="JSON file to write.")
def main(
    models: tuple[str, ...],
    sizes: tuple[int, ...],
    lengths: tuple[int, ...],
    loads: tuple[float, ...],
    count: int,
    rounds: int,
    seed: int,
    saved: Path | None,
    out: Path | None,
) -> None:
    """Measure, simulate, print the tables and write the JSON."""
    if saved is None:
        with Progress() as progress:
            costs = {name: measure(name, sizes, lengths, rounds, progress) for name in models or MODELS}
    else:
        known = json.loads(saved.read_text())["about"]["costs"]
        costs = {name: Costs.from_json(known[name]) for name in models or known}
    results: dict[str, list[dict[str, Any]]] = {}
    for name, found in costs.items():
        title = f"{name} ({MODELS[name].about})"
        measured, served = cost_rows(found), compared(found, loads, count, seed)
        print(markdown({f"a call of {title}": measured}, COST_COLUMNS))
        print(markdown({f"servers of {title}": served}, COLUMNS))
        results |= {f"a call of {title}": measured, f"servers of {title}": served}
    about = {"costs": {name: found.as_json() for name, found in costs.items()}, "requests": count, "seed": seed}
    if saved is None or out is not None:  # simulating again takes nothing from what was measured
        path = write(results, "cpu", "torch.float32", out or results_path("cpu", "-serving"), **about)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
