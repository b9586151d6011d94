"""A fresh process that runs archives: ``python run_archive.py CASES OUT``; neither diffusers nor the models' code.

CASES is a file of ``[(archive, weights, [runs])]``, runs are lists of calls ``(context, kwargs)``. OUT gets, for each
case, the first result of each call and the marks of the last runs, and then which modules were imported.
"""

import contextlib
import sys

import torch

import cachepass

cases, out = sys.argv[1:]
told = []
for archive, weights, runs in torch.load(cases, weights_only=False):
    model = cachepass.load(archive, weights)
    results = []
    for run in runs:
        for context, kwargs in run:
            with cachepass.cache_context(context) if context else contextlib.nullcontext():
                results.append(model(**kwargs)[0].clone())
    summary = cachepass.summary(model)
    told.append((results, summary.last_runs, summary.by_context))
heavy = ("torch._dynamo", "torch._inductor", "diffusers", "zoo", "small_models", "models")
torch.save((told, [name for name in heavy if name in sys.modules]), out)
