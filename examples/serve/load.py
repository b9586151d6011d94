"""Load for the server of app.py: so many requests by so many clients, in at most so many seconds.

    python examples/serve/load.py --requests 64 --clients 8

Only this machine is asked, at its loopback address. A request whose replica died is made again; its seed is the same,
and so is the picture. Half of the clients follow the progress of theirs.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import click

HOST = "127.0.0.1"
STEPS = (12, 16, 20)


@dataclass(frozen=True)
class Asked:
    """A picture to ask for."""

    number: int
    label: int
    seed: int
    steps: int

    @property
    def query(self) -> str:
        return f"label={self.label}&seed={self.seed}&steps={self.steps}"


@dataclass(frozen=True)
class Answer:
    """What came of it: the PNG, seconds from the first try, how many tries, and the process that made it."""

    asked: Asked
    png: bytes
    seconds: float
    tries: int
    process: int


class LoadError(Exception):
    """The time is over, and pictures are missing."""


def asked_for(requests: int, seed: int, steps: Sequence[int]) -> list[Asked]:
    """Digits of several lengths, each with a seed of its own."""
    return [Asked(n, n % 10, seed + n, steps[n % len(steps)]) for n in range(requests)]


def load(
    port: int, requests: int, clients: int, seconds: float, *, seed: int = 0, steps: Sequence[int] = STEPS,
    on_answer: Callable[[Answer], object] = lambda _: None,
) -> list[Answer]:  # fmt: skip
    """Make the requests; ``on_answer`` is told of each answer.

    Raises:
        LoadError: The seconds were over before all pictures were there.
    """
    until = time.monotonic() + seconds
    over = threading.Event()

    def client(one: Asked) -> Answer:
        try:
            answer = _ask(port, one, until, over, follow=one.number % 4 < 2)
        except LoadError:
            over.set()  # for the other clients, too
            raise
        on_answer(answer)
        return answer

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(client, asked_for(requests, seed, steps)))


def _ask(port: int, one: Asked, until: float, over: threading.Event, *, follow: bool) -> Answer:
    """Try until there is an answer: a server that is busy says 503, a replica that died breaks the connection, or
    leaves 500 behind."""
    start, tries, reason = time.monotonic(), 0, "no try was made"
    while not over.is_set() and (left := until - time.monotonic()) > 0:
        tries += 1
        try:
            png, process = (_follow if follow else _fetch)(port, one, left)
            return Answer(one, png, time.monotonic() - start, tries, process)
        except (OSError, http.client.HTTPException, _Again) as error:
            reason = f"{type(error).__name__}: {error}"
        over.wait(min(0.1 * 2 ** min(tries, 5), max(until - time.monotonic(), 0)))
    raise LoadError(f"no picture for {one} after {tries} tries: {reason}")


class _Again(Exception):
    """What a server says that is about to do better."""


def _get(port: int, path: str, seconds: float) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(HOST, port, timeout=max(seconds, 0.1))
    connection.request("GET", path)
    response = connection.getresponse()
    if response.status != 200:
        said = response.read(200).decode(errors="replace")
        connection.close()
        if response.status < 500:
            raise LoadError(f"{path}: {response.status} {said}")  # another try would not be answered either
        raise _Again(f"{response.status} {said}")
    return connection, response


def _fetch(port: int, one: Asked, seconds: float) -> tuple[bytes, int]:
    connection, response = _get(port, f"/image?{one.query}", seconds)
    with contextlib.closing(connection):
        return response.read(), int(response.headers["X-Process"])


def _follow(port: int, one: Asked, seconds: float) -> tuple[bytes, int]:
    """The same with progress: a line for each step, the last with the picture."""
    connection, response = _get(port, f"/stream?{one.query}", seconds)
    with contextlib.closing(connection):
        step = 0
        for line in response:
            told = json.loads(line)
            if "error" in told or told["step"] != step + 1:
                raise _Again(f"after step {step}: {told}")
            step = told["step"]
            if "png" in told:
                response.read()  # to its end, so that nobody is told of a client that left
                return base64.b64decode(told["png"]), int(response.headers["X-Process"])
    raise _Again(f"the answer ended after step {step} of {one.steps}")


@click.command()
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535))
@click.option("--requests", default=64, show_default=True, type=click.IntRange(1, 10_000))
@click.option("--clients", default=8, show_default=True, type=click.IntRange(1, 64))
@click.option("--seconds", default=120.0, show_default=True, type=click.FloatRange(1, 3600), help="At most.")
@click.option("--seed", default=0, show_default=True)
def main(port: int, requests: int, clients: int, seconds: float, seed: int) -> None:
    """Make the requests, and print how long they took."""
    start = time.monotonic()
    try:
        answers = load(port, requests, clients, seconds, seed=seed)
    except LoadError as error:
        sys.exit(f"error: {error}")
    took = time.monotonic() - start
    seconds_each = sorted(answer.seconds for answer in answers)
    replicas = len({answer.process for answer in answers})
    again = sum(answer.tries > 1 for answer in answers)
    p95 = seconds_each[max(-(-95 * len(seconds_each) // 100), 1) - 1]
    print(
        f"{len(answers)} pictures by {replicas} replicas in {took:.1f} s: {len(answers) / took:.1f} per second; "
        f"latency p50 {statistics.median(seconds_each):.2f} s, p95 {p95:.2f} s; {again} asked for more than once"
    )


if __name__ == "__main__":
    main()
