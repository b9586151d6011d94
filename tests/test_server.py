"""The server of the docs: requests at once, each as if it were alone, and what is held stays flat."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
testclient = pytest.importorskip("fastapi.testclient")


@pytest.fixture
def client():
    import server

    server.app.state.lowering = "eager"
    with testclient.TestClient(server.app) as client:
        yield client


def test_requests_at_once_give_what_each_gives_alone(client):
    alone = [client.get("/image", params={"seed": seed}).json()["image"] for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: client.get("/image", params={"seed": seed}).json(), range(4)))
    assert [answer["image"] for answer in together] == alone
    assert len({answer["request"] for answer in together}) == 4


def test_what_is_held_does_not_grow_with_requests(client):
    held = []
    for seed in range(10):
        client.get("/image", params={"seed": seed})
        held.append(client.get("/memory").json()["held"])
    assert 0 < held[0] <= held[-1] == held[3] <= 3 * held[0]
