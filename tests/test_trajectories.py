"""A trajectory is never guessed wrong in silence: every way of compiling with every way of calling (eager lowering).

Expected is what the reference gives that is told whose step each call is (``told.py``); where nobody can know, the
uncached model and a warning.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import trajectories
from diffusers.models.cache_utils import CacheMixin
from small_models import Guided
from told import CACHES, told
from trajectories import Call, Scenario
from zoo import relative_error

import cachepass
from cachepass import CachepassWarning
from cachepass.integrations.diffusers import enable_cache
from cachepass.run.model import Model

TOLERANCE = 1e-5  # relative, fp32


class Denoiser(Guided, CacheMixin):
    """What diffusers' models have: ``cache_context``. ``breaks``: the graph breaks in front of the last block."""

    breaks = False

    def between(self, x: torch.Tensor) -> torch.Tensor:
        if self.breaks:
            torch._dynamo.graph_break()
        return x


def denoiser(depth: int) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(depth).eval().requires_grad_(False)


# ---- ways of compiling ----------------------------------------------------------------------------------------------

Compiled = Callable[..., torch.Tensor]


def settings(cache: str, **options: Any) -> dict[str, Any]:
    return {"backend": "cached_inductor", "options": {"lowering": "eager", "cache": CACHES[cache], **options}}


def compiled(model: Denoiser, cache: str, **options: Any) -> Compiled:
    return torch.compile(model, fullgraph=True, **settings(cache, **options))


def in_place(model: Denoiser, cache: str, **options: Any) -> Compiled:
    model.compile(fullgraph=True, **settings(cache, **options))
    return model


def by_blocks(model: Denoiser, cache: str, **options: Any) -> Compiled:
    for block in model.blocks:
        block.compile(fullgraph=True, **settings(cache, **options))
    return model


def broken(model: Denoiser, cache: str, **options: Any) -> Compiled:
    model.breaks = True
    model.compile(**settings(cache, **options))
    return model


def enabled(model: Denoiser, cache: str, **options: Any) -> Compiled:
    enable_cache(model, CACHES[cache], lowering="eager", **options)
    return model


def enabled_and_broken(model: Denoiser, cache: str, **options: Any) -> Compiled:
    model.breaks = True
    enable_cache(model, CACHES[cache], lowering="eager", fullgraph=False, **options)
    return model


def function(model: Denoiser, cache: str, **options: Any) -> Compiled:
    """What a bare loop calls."""

    def step(latents: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor, perturbed: bool = False) -> Any:
        return model(latents, timestep, prompt, perturbed)

    return torch.compile(step, fullgraph=True, **settings(cache, **options))


Way = Callable[..., Compiled]
WHOLE: tuple[Way, ...] = (compiled, in_place, enabled, function)
PARTS: tuple[Way, ...] = (by_blocks, broken, enabled_and_broken)
WAYS = (*WHOLE, *PARTS[:2])
every_way = pytest.mark.parametrize("way", WAYS)


def pairs(ways: tuple[Way, ...]) -> list[tuple[Way, Scenario]]:
    """Every scenario once, every way in its turn."""
    return list(zip(itertools.cycle(ways), trajectories.TOLD_APART, strict=False))


# ---- what is checked ------------------------------------------------------------------------------------------------


class Bench:
    """A compiled model beside the reference, fed with the same calls."""

    def __init__(self, way: Way, cache: str = "taylorseer", **options: Any) -> None:
        # One block would do, but for two graphs, or what is behind the first block; tracing takes most of the time.
        depth = 2 if way in PARTS or cache == "first_block_cache" else 1
        self.model, self.plain = denoiser(depth), denoiser(depth)
        self.told = told(self.plain, cache)
        self.compiled = way(self.model, cache, **options)

    def run(self, scenario: Scenario) -> None:
        """Every result is the reference's."""
        calls = enumerate(scenario())
        while (numbered := next(calls, None)) is not None:
            number, call = numbered
            error = relative_error(self.answer(call), self.told.call(call.trajectory, *call.inputs, step=call.step))
            assert error < TOLERANCE, f"call {number}, of {call.trajectory}: {error:.1e}"
            del numbered, call  # and with them the tensors of a run that is over
        assert self.predicted() == self.told.predicted

    def answer(self, call: Call) -> torch.Tensor:
        with call.said(self.model):
            return self.compiled(*call.inputs)

    def predicted(self) -> int:
        return sum(cachepass.summary(self.model).predicted.values())


@every_way
@pytest.mark.parametrize("scenario", trajectories.TOLD_APART)
@pytest.mark.covering(times=2)
def test_told_apart(scenario, way):
    bench, expected = Bench(way), trajectories.TOLD_APART[scenario]
    bench.run(scenario)
    summary = cachepass.summary(bench.model)
    assert bench.predicted() > 0
    assert expected is None or set(summary.contexts) == expected


@every_way
@pytest.mark.parametrize("scenario", trajectories.ANEW)
@pytest.mark.covering(times=2)
def test_told_apart_where_prompts_are_made_anew(scenario, way):
    """What depends on them is computed every time, and that is said where it would be kept otherwise."""
    bench = Bench(way)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CachepassWarning)
        bench.run(scenario)
    said = {str(each.message) for each in caught if issubclass(each.category, CachepassWarning)}
    assert all("is another tensor at every step" in message for message in said) and len(said) <= 1
    assert bench.predicted() > 0


@pytest.mark.parametrize("scenario", [trajectories.one_call_with_a_batch, trajectories.contexts_of_diffusers,
                                      trajectories.silent])  # fmt: skip
def test_told_apart_where_the_graph_of_a_model_with_enable_cache_breaks(scenario):
    bench = Bench(enabled_and_broken)
    bench.run(scenario)
    assert bench.predicted() > 0
    assert set(cachepass.summary(bench.model).contexts) == trajectories.TOLD_APART[scenario]


@pytest.mark.parametrize(("way", "scenario"), pairs(WAYS))
@pytest.mark.covering
def test_told_apart_under_pab(scenario, way):
    bench = Bench(way, "pab")
    bench.run(scenario)
    assert bench.predicted() > 0


@pytest.mark.parametrize(("way", "scenario"), pairs(WHOLE))
def test_told_apart_under_first_block_cache(scenario, way):
    bench = Bench(way, "first_block_cache")
    bench.run(scenario)
    assert 0 < bench.predicted() < cachepass.summary(bench.model).steps


@every_way
@pytest.mark.parametrize("scenario", trajectories.ONE_STEP)
@pytest.mark.covering(times=2)
def test_a_model_of_one_step_is_computed(scenario, way):
    """Nothing is predicted of an image from another one's, with or without a word about it."""
    bench = Bench(way)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CachepassWarning)
        for call in scenario():
            assert relative_error(bench.answer(call), bench.plain(*call.inputs)) < TOLERANCE
    assert bench.predicted() == 0


@every_way
@pytest.mark.parametrize("scenario", trajectories.UNDECIDED)
@pytest.mark.covering(times=2)
def test_where_nothing_tells_the_calls_apart(scenario, way):
    """As the reference, without a word; or computed, once that is said with the line to add."""
    bench = Bench(way)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CachepassWarning)
        results = [(bench.answer(call), call) for call in scenario()]
    said = [str(each.message) for each in caught if issubclass(each.category, CachepassWarning)]
    if said:
        assert len(said) == 1 and "cachepass.cache_context(" in said[0]
        assert bench.predicted() == 0
        expected = [bench.plain(*call.inputs) for _, call in results]
    else:
        expected = [bench.told.call(call.trajectory, *call.inputs) for _, call in results]
        assert bench.predicted() == bench.told.predicted
    for number, ((result, call), each) in enumerate(zip(results, expected, strict=True)):
        error = relative_error(result, each)
        assert error < TOLERANCE, f"call {number}, of {call.trajectory}: {error:.1e}, said: {said}"


@every_way
@pytest.mark.parametrize("scenario", trajectories.COUNTED)
@pytest.mark.covering(times=2)
def test_with_the_number_of_steps(scenario, way):
    bench = Bench(way, num_inference_steps=9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CachepassWarning)
        bench.run(scenario)
    assert bench.predicted() > 0
    said = [str(each.message) for each in caught]
    if scenario is trajectories.longer_than_said:
        assert len(said) == 1 and "the timestep goes on from 340 to 270 after 9 steps" in said[0]
    else:  # runs that end early: two of one length, or none, which may have been cancelled
        assert all("ended after 6 steps" in message for message in said) and len(said) <= 1


@pytest.mark.parametrize(("way", "scenario"), pairs((compiled, by_blocks)))
def test_timesteps_that_lie_on_a_device(scenario, way, monkeypatch):
    """With the number of steps given they are waited for in the first steps of each run, until it is known whose calls
    a step has, and not after that."""
    reads: list[bool] = []
    read = Model.read_timestep

    def counted(self: Model, value: Any, *said: Any, **how: Any) -> float | None:
        timestep = read(self, value, *said, **how)
        reads.append(timestep is not None)
        return timestep

    monkeypatch.setattr("cachepass.run.model.is_far", lambda _: True)
    monkeypatch.setattr(Model, "read_timestep", counted)
    bench = Bench(way, num_inference_steps=len(trajectories.TIMES))
    bench.run(scenario)
    assert bench.predicted() > 0
    runs = cachepass.summary(bench.model).runs
    assert sum(reads) <= 3 * runs


@every_way
def test_a_reset_ends_every_trajectory(way):
    """In the middle of a run of two calls that nobody names: the same timesteps go on, as another run's."""

    def reset_in_the_middle():
        prompts = [trajectories.prompt(0), trajectories.prompt(1)]
        for number, call in enumerate(trajectories.guided(0, prompts)):
            if number == 8:
                cachepass.reset(bench.model)
            yield Call(f"{call.trajectory}{'again' * (number >= 8)}", call.inputs)

    bench = Bench(way)
    bench.run(reset_in_the_middle)


# ---- threads --------------------------------------------------------------------------------------------------------


def in_turns(works: list[Callable[[], Any]]) -> None:
    """Run iterators in a thread each: one item of the first, one of the second, and so on."""
    turn, failures, over = [0], [], object()
    changed = threading.Condition()

    def work(own: int, make: Callable[[], Any]) -> None:
        items = None
        for _ in itertools.count():
            with changed:
                changed.wait_for(lambda: turn[0] % len(works) == own or failures, timeout=60)
                if failures:
                    return
                try:
                    items = make() if items is None else items
                    with torch.no_grad():
                        done = next(items, over) is over
                except BaseException as error:
                    failures.append(error)
                    done = True
                turn[0] += 1
                changed.notify_all()
            if done:
                return

    threads = [threading.Thread(target=work, args=each) for each in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def steps_in_a_thread(bench: Bench, thread: int, scenario: Scenario, outer: str | None):
    """The calls of a scenario, each checked; the reference's trajectories are the thread's own."""
    for number, call in enumerate(scenario()):
        if outer is None:
            result = bench.answer(call)
        else:
            with cachepass.cache_context(outer):
                result = bench.answer(call)
        expected = bench.told.call(f"thread {thread}, {call.trajectory}", *call.inputs)
        error = relative_error(result, expected)
        assert error < TOLERANCE, f"thread {thread}, call {number}, of {call.trajectory}: {error:.1e}"
        yield


@pytest.mark.parametrize(("way", "scenario", "outer"), [
    *((way, trajectories.silent, outer) for way in WAYS for outer in (False, True)),
    *((way, trajectories.one_call_with_a_batch, False) for way in (compiled, by_blocks)),
    *((way, trajectories.contexts, True) for way in (in_place, enabled, broken)),
])  # fmt: skip
def test_two_threads_that_take_turns(way, scenario, outer):
    """They call the same model at the same timesteps, and each has trajectories of its own: by itself, or by name."""
    bench = Bench(way)
    works = [
        lambda thread=thread: steps_in_a_thread(bench, thread, scenario, f"user-{thread}" if outer else None)
        for thread in range(2)
    ]
    in_turns(works)
    assert bench.predicted() == bench.told.predicted > 0


@pytest.mark.parametrize("way", [compiled, enabled, by_blocks])
def test_one_run_whose_steps_are_made_in_two_threads(way):
    """By its name it is one trajectory, wherever its calls come from."""

    def every_second(start: int):
        for number, call in enumerate(calls):
            if number % 2 == start:
                result = bench.answer(call)
                assert relative_error(result, bench.told.call(call.trajectory, *call.inputs)) < TOLERANCE, number
                yield

    bench = Bench(way)
    calls = list(trajectories.guided(0, [trajectories.prompt(0)], saids=[trajectories.named("shared")]))
    in_turns([lambda: every_second(0), lambda: every_second(1)])
    assert bench.predicted() == bench.told.predicted > 0


# ---- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", CACHES)
def test_what_the_reference_predicts(cache):
    """It is far from the uncached model wherever it predicts, so that no test passes without its cache."""
    plain = denoiser(2)
    reference = told(plain, cache)
    errors = []
    for call in trajectories.contexts():
        before = reference.predicted
        error = relative_error(reference.call(call.trajectory, *call.inputs), plain(*call.inputs))
        errors.append((reference.predicted - before, error))
    assert all(error > 100 * TOLERANCE if predicted else error == 0 for predicted, error in errors)
    assert {predicted for predicted, _ in errors} == {0, 1}


def test_the_reference_forgets_a_trajectory_that_ended():
    reference, fresh = (told(denoiser(1), "taylorseer") for _ in range(2))
    calls = list(trajectories.guided(0, [trajectories.prompt(0)]))
    for call in calls[:4]:
        reference.call("a", *call.inputs)
    before = reference.predicted
    reference.end("a")
    for call in calls:
        assert torch.equal(reference.call("a", *call.inputs), fresh.call("a", *call.inputs))
    assert reference.predicted == before + fresh.predicted
