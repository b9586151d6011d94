"""What is shown while a model is compiled, and how long that took."""

from __future__ import annotations

import io
import sys
import time

import pytest
import torch
from small_models import calls, transformer

import cachepass
from cachepass.program.progress import compiling, shown_elsewhere


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def shown(monkeypatch):
    """What a function shows on a terminal. (pytest puts its own stderr in place after a fixture is made.)"""
    monkeypatch.setenv("TERM", "xterm")

    def of(function):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", Terminal())
            function()
            return sys.stderr.getvalue()

    return of


def run(steps=6, **options):
    options = {"cache": {"method": "taylorseer", "cache_interval": 2, "disable_cache_before_step": 1}, **options}
    model = torch.compile(transformer(), backend="cached_inductor", fullgraph=True, options=options)
    for call in calls(steps):
        model(*call)
    return model


@pytest.mark.inductor
def test_programs_are_named_on_a_terminal(shown):
    models, start = [], time.perf_counter()
    text = shown(lambda: models.append(run()))
    elapsed = time.perf_counter() - start
    assert "capturing the model" in text
    assert "compiling compute, program 1 of at most 2" in text
    assert "compiling predict, program 2 of at most 2" in text
    found = cachepass.summary(models[0])
    assert found.capture_seconds > 0 and set(found.variants) == {"compute", "predict"}
    assert 0.5 * elapsed < found.compile_seconds < elapsed  # six steps of two tiny blocks take none of it
    assert f"compiled in {found.compile_seconds:.1f} s: capture" in str(found)


@pytest.mark.inductor
def test_nothing_is_shown_where_it_was_switched_off(shown):
    assert shown(lambda: run(steps=1, progress=False)) == ""


def line():
    with compiling("this", shown=True):
        pass


def test_nothing_is_shown_beside_another_progress_bar(shown):
    with shown_elsewhere():
        assert shown(line) == ""
    assert "cachepass: this" in shown(line)


def test_nothing_is_shown_without_a_terminal(capsys):
    line()
    assert capsys.readouterr().err == ""
