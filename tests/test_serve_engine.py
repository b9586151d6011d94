"""The engine of the server on Ray Serve, without Ray: requests join, leave, fail and are given up."""

from __future__ import annotations

import queue
import sys
from pathlib import Path

import pytest
import torch

import cachepass
from cachepass.run.rows.step import RowsStep

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "serve"))
STEPS = 8
ROUNDING = 1e-4  # batches of different sizes round differently, and eight steps of guidance amplify it


@pytest.fixture(scope="module")
def engine():
    from engine import Engine

    with torch.no_grad():
        engine = Engine(lowering="eager", max_requests=2, max_active=3)
    yield engine
    engine.close()
    assert not engine.alive


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Not between these tests: they share what is compiled."""


def told(engine, label: int, seed: int) -> tuple[str, queue.Queue]:
    from engine import Job

    answers: queue.Queue = queue.Queue()
    return engine.submit(Job(label, seed, STEPS, answers.put)), answers


def end_of(answers: queue.Queue) -> list:
    """All that was told of a request."""
    found = [answers.get(timeout=60)]
    while found[-1].image is None and found[-1].error is None:
        found.append(answers.get(timeout=60))
    return found


def test_requests_that_join_in_the_middle_get_the_picture_that_they_get_alone(engine):
    alone = [end_of(told(engine, label, seed=label)[1])[-1].image for label in range(5)]
    waiting = [told(engine, label, seed=label)[1] for label in range(5)]
    found = [end_of(answers) for answers in waiting]
    assert [[step.step for step in steps] for steps in found] == [list(range(1, STEPS + 1))] * 5
    for steps, image in zip(found, alone, strict=True):
        torch.testing.assert_close(
            steps[-1].image, image, rtol=0, atol=1e-4
        )  # a batch of another size rounds otherwise


def test_a_step_that_raises_is_made_again_and_then_given_up(engine, monkeypatch):
    expected = end_of(told(engine, 7, seed=1)[1])[-1].image
    launch, failures = RowsStep._launch, iter([True, True, False, False, True])

    def fails(*args):
        if next(failures, False):
            raise RuntimeError("out of luck")
        return launch(*args)

    monkeypatch.setattr(RowsStep, "_launch", fails)
    steps = end_of(told(engine, 7, seed=1)[1])
    assert len(steps) == STEPS
    torch.testing.assert_close(steps[-1].image, expected, rtol=0, atol=ROUNDING)

    failures = iter([False, True, True, True])
    steps = end_of(told(engine, 7, seed=1)[1])
    assert [step.step for step in steps] == [1, 1] and "out of luck" in steps[-1].error
    torch.testing.assert_close(
        end_of(told(engine, 7, seed=1)[1])[-1].image, expected, rtol=0, atol=1e-4
    )  # a batch of another size rounds otherwise


def test_a_request_that_is_cancelled_is_told_nothing_more_and_leaves_nothing(engine):
    name, answers = told(engine, 3, seed=3)
    answers.get(timeout=60)
    engine.cancel(name)
    end_of(told(engine, 4, seed=4)[1])
    assert answers.qsize() < STEPS
    end_of(told(engine, 5, seed=5)[1])
    assert not [context for context in cachepass.memory(engine.model).contexts if context.startswith(f"{name}/")]
