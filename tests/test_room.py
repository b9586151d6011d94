"""What a model keeps is bounded: many prompt lengths, resolutions, contexts, threads."""

from __future__ import annotations

import threading

import pytest
import torch
from small_models import Transformer, calls, transformer
from zoo import relative_error

import cachepass
from cachepass import cache_context
from cachepass.run.live import programs_of

TAYLOR = {"method": "taylorseer", "cache_interval": 3, "disable_cache_before_step": 2, "taylor_factors_dtype": None}
STEPS = 6


def compiled(model: Transformer, **options):
    return torch.compile(
        model, backend="cached_inductor", fullgraph=True, options={"cache": TAYLOR, "lowering": "eager", **options}
    )


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, length, 8, generator=torch.Generator().manual_seed(seed))


def run_of(model, context: torch.Tensor, x: torch.Tensor | None = None) -> list[torch.Tensor]:
    """A run under a prompt, at the size of ``x``."""
    return [
        model(latents if x is None else x + 0.01 * step, t, context) for step, (latents, t) in enumerate(calls(STEPS))
    ]


def record_of(model):
    return next(programs_of(model))[1].model


def test_fifty_prompt_lengths():
    """Each is right, and memory is flat."""
    model, bound = compiled(transformer(cross=True), max_cache_bytes=2**14), 2**14
    held = []
    for length in range(3, 53):
        got = run_of(model, tokens(length, length))
        alone = compiled(transformer(cross=True))
        if length % 16 == 3:
            for a, b in zip(got, run_of(alone, tokens(length, length)), strict=True):
                assert relative_error(a, b) < 1e-5
        held.append(cachepass.summary(model).held_bytes)
    assert 0 < max(held) <= bound
    summary = cachepass.summary(model)
    assert summary.predicted["taylorseer"] == 50 * 3
    assert summary.max_bytes == bound and "held in all" in str(summary)
    assert not summary.warnings


def test_twenty_resolutions():
    model, bound = compiled(transformer(cross=True), max_cache_bytes=2**14), 2**14
    context = tokens(4)
    for size in range(4, 24):
        x = torch.randn(2, size, 8, generator=torch.Generator().manual_seed(size))
        got = run_of(model, context, x)
        assert cachepass.summary(model).held_bytes <= bound
        if size in (4, 23):
            for a, b in zip(got, run_of(compiled(transformer(cross=True)), context, x), strict=True):
                assert relative_error(a, b) < 1e-5
    assert cachepass.summary(model).predicted["taylorseer"] == 20 * 3


def test_runs_in_progress_that_do_not_fit_compute_and_it_is_said():
    """Two contexts, and room for one: right, slower, and the option is named."""
    original = transformer(cross=True)
    one = compiled(transformer(cross=True))
    run_of(one, tokens(5))
    bound = cachepass.summary(one).held_bytes
    model = compiled(original, max_cache_bytes=bound)
    with pytest.warns(cachepass.CachepassWarning, match=r"more than \d+ bytes.*max_cache_bytes"):
        for x, t in calls(STEPS):
            for name, prompt in (("a", tokens(5)), ("b", tokens(5, 1))):
                with cache_context(name):
                    assert relative_error(model(x, t, prompt), original(x, t, prompt)) < 1e-5
    assert cachepass.summary(model).held_bytes <= bound


def test_contexts_that_never_come_again():
    """A server that names one for each request: neither states nor counts grow without end."""
    model = compiled(transformer())
    for request in range(300):
        with cache_context(f"request-{request}"):
            model(*calls(1)[0])
    record, summary = record_of(model), cachepass.summary(model)
    assert len(record.runs) <= 256
    assert summary.computed == {"taylorseer": 300}
    assert len(summary.by_context) <= 257 and "earlier contexts" in summary.by_context


def test_threads_that_are_over_leave_nothing_behind():
    """Their states serve the next thread."""
    model = compiled(transformer())
    expected = run_of(model, None)
    for _ in range(5):
        results = []
        thread = threading.Thread(target=lambda out=results: out.extend(torch.no_grad()(run_of)(model, None)))
        thread.start()
        thread.join()
        for a, b in zip(results, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert len(record_of(model).runs) == 2


def test_layouts_are_bounded():
    model = compiled(transformer(cross=True))
    for size in range(4, 90):
        x = torch.randn(2, size, 8)
        model(x, torch.full((2,), 900.0 - size), tokens(3))
    assert all(len(dispatcher.places._layouts) <= 64 for dispatcher, _ in programs_of(model))


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "4GB"])
def test_the_option_is_checked(value):
    with pytest.raises(cachepass.OptionError, match=r"max_cache_bytes.*expected a number of bytes"):
        compiled(transformer(), max_cache_bytes=value)(*calls(1)[0])
