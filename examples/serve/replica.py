"""A replica: the engine's requests by HTTP. Ray Serve makes as many of it as there is work for."""

import asyncio
import base64
import contextlib
import io
import json
import os
from collections.abc import AsyncIterator
from typing import Annotated

import torch
from engine import Engine, Job, Told
from fastapi import FastAPI, HTTPException, Query
from fastapi.responses import Response, StreamingResponse
from PIL import Image
from ray import serve

api = FastAPI()

Label = Annotated[int, Query(ge=0, le=9)]
Seed = Annotated[int, Query(ge=0, lt=2**63)]
Steps = Annotated[int, Query(ge=1, le=100)]


# Serve takes the routes along as they are when the class is decorated: what they call is defined above it.


def png(image: torch.Tensor) -> bytes:
    """A picture in [-1, 1], four times as large."""
    picture = Image.fromarray(image.add(1).mul(127.5).round().byte().numpy())
    file = io.BytesIO()
    picture.resize((112, 112), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def whoami() -> dict[str, str]:
    """Which replica answers."""
    return {"X-Replica": serve.get_replica_context().replica_id.unique_id, "X-Process": str(os.getpid())}


@serve.deployment(
    # One replica at rest, more when each has more requests than its engine steps at a time.
    autoscaling_config={"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 6},
    max_ongoing_requests=32,
    ray_actor_options={"num_cpus": 1},
)
@serve.ingress(api)
class Digits:
    """A replica."""

    def __init__(self, lowering: str = "specialize") -> None:
        torch.set_num_threads(1)  # a replica has one core
        self.engine = Engine(lowering=lowering)

    @api.get("/image")
    async def image(self, label: Label = 0, seed: Seed = 0, steps: Steps = 20) -> Response:
        """The picture, as PNG."""
        async with contextlib.aclosing(self._make(label, seed, steps)) as told:
            async for step in told:
                if step.error is not None:
                    raise HTTPException(500, step.error)
                if step.image is not None:
                    return Response(png(step.image), media_type="image/png", headers=whoami())
        raise HTTPException(500, "the engine ended before the picture was made")

    @api.get("/stream")
    async def stream(self, label: Label = 0, seed: Seed = 0, steps: Steps = 20) -> StreamingResponse:
        """A line of JSON for each step; the last one has the picture, PNG in base64."""
        return StreamingResponse(self._lines(label, seed, steps), media_type="application/x-ndjson", headers=whoami())

    async def _lines(self, label: int, seed: int, steps: int) -> AsyncIterator[str]:
        async with contextlib.aclosing(self._make(label, seed, steps)) as told:
            async for step in told:
                line: dict[str, int | str] = {"step": step.step, "steps": step.steps}
                if step.error is not None:
                    line["error"] = step.error
                if step.image is not None:
                    line["png"] = base64.b64encode(png(step.image)).decode()
                yield json.dumps(line) + "\n"

    async def _make(self, label: int, seed: int, steps: int) -> AsyncIterator[Told]:
        """What the engine tells of one request, to its end. A client that goes away takes its request along."""
        told: asyncio.Queue[Told] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        name = self.engine.submit(
            Job(label, seed, steps, lambda step: loop.call_soon_threadsafe(told.put_nowait, step))
        )
        try:
            while True:
                step = await told.get()
                yield step
                if step.image is not None or step.error is not None:
                    return
        finally:
            self.engine.cancel(name)

    def check_health(self) -> None:
        """Asked by Serve, which replaces the replica if this raises."""
        if not self.engine.alive:
            raise RuntimeError("the engine's thread has ended")
