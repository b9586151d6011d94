"""The first hour with a model of one's own: from the README's line to a server, at toy size (eager lowering)."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from video_dit import STEPS, compared, make, prompt, sample

import cachepass
from cachepass import CachepassWarning, TaylorSeerCacheConfig, cache_context

CACHE = TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=3)
PREDICTED = 6  # steps 4, 5, 7, 8, 10, 11
OPTIONS = {"lowering": "eager", "num_inference_steps": STEPS}


def compiled(cache=CACHE, **options):
    return torch.compile(
        make(), backend="cached_inductor", fullgraph=True, options={"cache": cache, **OPTIONS, **options}
    )


def seeded(model, *args, **kwargs):
    torch.manual_seed(0)
    return sample(model, *args, **kwargs)


def test_the_line_of_the_readme_in_a_loop_that_calls_twice():
    """Without a word about contexts the two calls are told apart by their prompts."""
    model = compiled()
    result, expected = seeded(model), seeded(make())
    found = cachepass.summary(model)
    assert found.contexts == ("default", "call 2") and sum(found.predicted.values()) == 2 * PREDICTED
    assert 0 < (result - expected).norm() / expected.norm() < 0.1


def test_contexts_give_the_same():
    with_contexts = seeded(compiled(), said=cache_context)
    assert torch.equal(with_contexts, seeded(compiled()))


def test_a_careless_loop_is_right_and_is_told():
    """Prompts made anew in every step: nothing wrong is predicted, and contexts make it fast again."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CachepassWarning)
        careless = compiled()
        result = seeded(careless, anew=True)
    assert any("is another tensor at every step" in str(each.message) for each in caught)
    expected = seeded(make())
    assert (result - expected).norm() / expected.norm() < 0.1
    warned = str(next(each for each in caught if "another tensor" in str(each.message)).message)
    assert "its values were the same" in warned and 'options["invariant_inputs"] = ["text"]' in warned
    followed = compiled(invariant_inputs=["text"])  # the advice, followed
    assert torch.equal(seeded(followed, anew=True, said=cache_context), seeded(compiled(), said=cache_context))


def test_compare_choose_save_and_load_in_another_process(tmp_path):
    caches = [
        CACHE,
        cachepass.FirstBlockCacheConfig(threshold=0.2),
        {"method": "pab", "cross_attention_block_skip_range": 2},
    ]
    found = cachepass.compare(*compared(), caches, options=OPTIONS, rounds=1, progress=False)
    assert all(row.failed is None for row in found.rows), str(found)
    chosen = min((row for row in found.rows[1:] if row.predicted), key=lambda row: row.error)
    chosen.config.save(tmp_path / "cache.json")
    found.to_html(tmp_path / "compared.html")
    script = (
        "import torch; from video_dit import *; import cachepass\n"
        f"options = {{'cache': {str(tmp_path / 'cache.json')!r}, **{OPTIONS!r}}}\n"
        "model = torch.compile(make(), backend='cached_inductor', fullgraph=True, options=options)\n"
        "torch.manual_seed(0)\n"
        f"torch.save(sample(model), {str(tmp_path / 'result.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent)
    torch.testing.assert_close(torch.load(tmp_path / "result.pt"), found.results[chosen.name], atol=1e-6, rtol=1e-5)


def serve(model, request: int) -> torch.Tensor:
    """One request, in a context of its own."""
    noise = torch.Generator().manual_seed(request)
    x, text, empty = torch.randn(1, 4, 2, 4, 4, generator=noise), prompt(request), prompt(0)
    with torch.no_grad(), cache_context(f"request-{request}"):
        for step in range(STEPS):
            timestep = torch.full((1,), 1000.0 * (1 - step / STEPS))
            with cache_context("cond"):
                cond = model(x, timestep, text)
            with cache_context("uncond"):
                uncond = model(x, timestep, empty)
            x = x - (uncond + 3.0 * (cond - uncond)) / STEPS
    return x


def test_two_requests_at_once():
    alone = [serve(compiled(), request) for request in (1, 2)]
    model, results = compiled(), {}
    serve(model, 0)  # so that nothing is compiled in two threads at once
    threads = [threading.Thread(target=lambda r=r: results.update({r: serve(model, r)})) for r in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for request, expected in zip((1, 2), alone, strict=True):
        torch.testing.assert_close(results[request], expected, atol=1e-6, rtol=1e-5)


def test_memory_is_flat_over_many_requests():
    model, held = compiled(), []
    for request in range(8):
        serve(model, request)
        held.append(cachepass.memory(model).held)
    assert held[1] == held[-1] == 2 * held[0] > 0 or held[0] == held[-1] > 0
    cachepass.reset(model, context="request-7")
    assert cachepass.memory(model).limit is not None


@pytest.mark.parametrize("cache", ["taylorseer", "pab", "first_block_cache", "fastercache", "invariant"])
def test_methods_by_their_bare_names(cache):
    """Each runs with its defaults; what would be better set is a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CachepassWarning)
        result, expected = seeded(compiled(cache), said=cache_context), seeded(make())
    assert (result - expected).norm() / expected.norm() < 0.2


@pytest.mark.parametrize(("cache", "options", "line"), [
    ("teacache", {"num_inference_steps": None}, 'options={"num_inference_steps": 28}'),
    ("sea_cache", {"num_inference_steps": None}, 'options={"num_inference_steps": 28}'),
    ("dbcache", {}, "DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0)"),
    ("mag_cache", {}, "cachepass.FLUX_MAG_RATIOS"),
])  # fmt: skip
def test_bare_names_that_need_a_setting_say_which(cache, options, line):
    with pytest.raises(cachepass.CachepassError) as caught:
        seeded(compiled(cache, **options), said=cache_context)
    assert line in str(caught.value), caught.value
