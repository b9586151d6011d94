"""The server on Ray Serve: clients, two replicas, one of them killed in the middle; every picture is right."""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil
import pytest
import torch

pytest.importorskip("ray.serve")
EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES / "serve"), str(EXAMPLES / "digits")]

REQUESTS, CLIENTS, STEPS, SEED = 64, 8, (7, 9), 100


@pytest.fixture
def server(tmp_path):
    """The server of two replicas, starting: its process, port and log. Nothing of it is left afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a short path: Ray's sockets are in it
    root = str(EXAMPLES.parent)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": folder}
    command = [sys.executable, str(EXAMPLES / "serve" / "app.py"), "--port", str(port), "--replicas", "2"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [*command, "--lowering", "eager"], env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path
        )
        try:
            yield process, port, tmp_path / "log"
        finally:
            if process.poll() is None:  # the test failed
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
                process.wait(30)
            shutil.rmtree(folder, ignore_errors=True)


def right_pictures(asked) -> dict[int, torch.Tensor]:
    """Without a server, by the sampling loop of the demo: guidance batches, scheduler and all."""
    from demo import sample
    from engine import CACHE, GUIDANCE
    from models import load_dit

    found: dict[int, torch.Tensor] = {}
    options = {"cache": CACHE, "lowering": "eager"}
    compiled = torch.compile(load_dit(), backend="cached_inductor", fullgraph=True, options=options)
    by_steps = defaultdict(list)
    for one in asked:
        by_steps[one.steps].append(one)
    for steps, some in by_steps.items():
        noise = [torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(one.seed)) for one in some]
        images = sample(compiled, torch.cat(noise), torch.tensor([one.label for one in some]), steps, GUIDANCE)
        found |= {one.number: image for one, image in zip(some, images[:, 0], strict=True)}
    return found


def read(png: bytes) -> torch.Tensor:
    """A pixel of four by four."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as picture:
        assert picture.size == (112, 112)
        return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(112, 112)[::4, ::4]


def wait_until_it_serves(process, log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while "serving on" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)


def test_every_picture_is_right_though_a_replica_is_killed(server):
    from load import asked_for, load

    process, port, log = server
    right = right_pictures(asked_for(REQUESTS, SEED, STEPS))  # while it starts
    wait_until_it_serves(process, log, 180)
    answers = []

    def kill_one(answer):
        answers.append(answer)
        if len(answers) == REQUESTS // 4:
            os.kill(answer.process, signal.SIGKILL)

    found = load(port, REQUESTS, CLIENTS, 150, seed=SEED, steps=STEPS, on_answer=kill_one)
    assert [answer.asked.number for answer in found] == list(range(REQUESTS))
    for answer in found:
        expected = right[answer.asked.number].add(1).mul(127.5).round()
        difference = (read(answer.png).float() - expected).abs().max()
        assert difference <= 1, (answer.asked, difference)  # where rounding goes the other way
    assert len({answer.process for answer in found}) >= 2
    assert any(answer.tries > 1 for answer in found), "requests were in the killed replica"

    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) > 2
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0, log.read_text()[-3000:]
    assert psutil.wait_procs(children, timeout=20)[1] == []
