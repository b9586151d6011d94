"""Images by HTTP, several requests at once through one compiled model; each in a cache context of its own.

    uvicorn server:app --app-dir examples        (pip install fastapi uvicorn)

A request's name tells its calls from those of the others. When it is over, also where it failed, its history is freed.
"""

import itertools
from contextlib import asynccontextmanager

import torch
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from two_blocks import make  # a model and the keyword arguments of one call: yours

import cachepass

STEPS = 20
CACHE = cachepass.TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=3)
numbers = itertools.count(1)
served = {}


@asynccontextmanager
async def compiled_once(app):
    """The programs are compiled before the first request."""
    model, inputs = make()
    options = {"cache": CACHE, "num_inference_steps": STEPS, "max_cache_bytes": 2**30, "lowering": app.state.lowering}
    served["model"] = torch.compile(model.eval(), backend="cached_inductor", fullgraph=True, options=options)
    served["inputs"] = inputs
    await run_in_threadpool(cachepass.warmup, served["model"], **inputs, progress=False)
    yield


app = FastAPI(lifespan=compiled_once)
app.state.lowering = "specialize"


def sample(name, seed):
    model, inputs = served["model"], served["inputs"]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(inputs["x"].shape, generator=generator)
    try:
        with torch.inference_mode(), cachepass.cache_context(name):
            for step in range(STEPS):
                timestep = torch.full_like(inputs["timestep"], 1000.0 * (1 - step / STEPS))
                x = x - model(**{**inputs, "x": x, "timestep": timestep}) / STEPS
        return x
    finally:
        cachepass.reset(model, context=name)


@app.get("/image")
async def image(seed: int = 0):
    name = f"request-{next(numbers)}"
    x = await run_in_threadpool(sample, name, seed)  # in a thread: other requests go on
    return {"request": name, "image": x.tolist()}


@app.get("/memory")
async def memory():
    found = cachepass.memory(served["model"])  # waits for nothing
    return {"held": found.held, "limit": found.limit, "contexts": list(found.contexts)}
