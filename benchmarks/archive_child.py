"""A process of benchmarks/archive.py: ``archive_child.py loaded|compiled FOLDER``. Prints when the first step was over,
and how long steps of each phase take."""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

import cachepass

kind, folder = sys.argv[1], Path(sys.argv[2])
settings = json.loads((folder / "settings.json").read_text())
weights = torch.load(folder / "weights.pt", mmap=True)
if kind == "loaded":
    model = cachepass.load(settings["archive"], weights)
else:
    from shapes import SHAPES

    with torch.device("meta"):
        whole = SHAPES[settings["shape"]].build()
    whole.to_empty(device="cpu").load_state_dict(weights, assign=True)
    options = {**settings["options"], "cache": settings["cache"], "progress": False}
    model = torch.compile(
        whole.eval().requires_grad_(False), backend="cached_inductor", fullgraph=True, options=options
    )
calls = torch.load(folder / "calls.pt")
first, times = None, []
with torch.no_grad():
    for _ in range(4):
        for call in calls:
            start = time.perf_counter()
            model(**call)
            times.append(time.perf_counter() - start)
            first = first or time.time()
marks = next(iter(cachepass.summary(model).last_runs["default"].values()))
times = times[len(calls) :]  # what the first run compiles, or loads, does not count
phases = {"compute": "#", "predict": "."}
told = {
    name: statistics.median(t for t, m in zip(times, marks * 3, strict=True) if m == mark)
    for name, mark in phases.items()
}
print(json.dumps({"first": first, **told}))
