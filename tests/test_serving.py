"""StepScheduler: every request gets its steps, in order, in bounded time, whatever comes and whatever the policy."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import calls, transformer

import cachepass
from cachepass.serving import (
    CatchUp,
    FirstCome,
    MeasuredCosts,
    Policy,
    Request,
    StepScheduler,
    Together,
    arrivals,
    phases_of,
    simulate,
    typical_cost,
)

MARKS = st.text("#.?", min_size=1, max_size=9)


class Adversary(Policy):
    """Picks at random, and never twice the same way."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def pick(self, ready, most, due):
        size = self.random.choice(ready).size
        alike = [row for row in ready if row.size == size]
        return self.random.sample(alike, self.random.randint(1, min(most, len(alike))))


class Spiteful(Policy):
    """Always takes the same one, as long as it may."""

    def pick(self, ready, most, due):
        return [max(ready, key=lambda row: (row.arrival, row.step))]


POLICIES = {
    "catch up": lambda _: CatchUp(),
    "first come": lambda _: FirstCome(),
    "spiteful": lambda _: Spiteful(),
    "adversary": Adversary,
}


@dataclasses.dataclass
class World:
    """An engine and its clients, who submit, cancel and fail as ``chance`` has it; what they saw."""

    scheduler: StepScheduler
    chance: random.Random
    fails: float = 0.0
    cancels: float = 0.0
    made: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    held: set[str] = dataclasses.field(default_factory=set)
    cancelled: set[str] = dataclasses.field(default_factory=set)
    passed: int = 0
    trace: list[tuple[str, ...]] = dataclasses.field(default_factory=list)

    def run(self, requests: list[Request]) -> None:
        coming, by_name, failed = list(requests), {request.name: request for request in requests}, 0
        for _ in range(10_000):
            while coming and self.chance.random() < 0.5:
                self.scheduler.submit(coming.pop(0))
            call = self.scheduler.next()
            self.held -= set(call.over)
            self.held |= set(call.names)
            self.check(call)
            if self.chance.random() < self.cancels:
                self.cancel(by_name)
            if call.rows and self.chance.random() < self.fails and failed < 50:
                failed += 1
                self.scheduler.failed(call)
            elif call.rows:
                self.scheduler.done(call)
                for row in call.rows:
                    self.made.setdefault(row.name, []).append(row.step)
            if not coming and not call:
                return
        raise AssertionError("the scheduler never came to an end")

    def check(self, call) -> None:
        assert len(call.rows) <= self.scheduler.max_rows
        assert len({row.size for row in call.rows}) <= 1
        assert len(set(call.names)) == len(call.rows)
        assert len(self.held) <= self.scheduler.max_active
        self.passed = max([self.passed, *(row.passed for row in call.rows)])
        self.trace.append(call.names)

    def cancel(self, by_name) -> None:
        name = self.chance.choice(list(by_name))
        if self.scheduler.cancel(name):
            self.cancelled.add(name)


def requests_of(marks: list[str], sizes: int) -> list[Request]:
    return [Request(f"r{index}", phases, size=index % sizes) for index, phases in enumerate(marks)]


@settings(max_examples=120, deadline=None)
@given(
    marks=st.lists(MARKS, max_size=14), sizes=st.integers(1, 3), max_rows=st.integers(1, 5),
    max_active=st.integers(1, 7), patience=st.integers(1, 6), policy=st.sampled_from(sorted(POLICIES)),
    fails=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_every_request_gets_its_steps_in_order_and_in_time(
    marks, sizes, max_rows, max_active, patience, policy, fails, seed
):
    requests = requests_of(marks, sizes)
    scheduler = StepScheduler(
        max_rows=max_rows, max_active=max_active, patience=patience, policy=POLICIES[policy](seed)
    )
    world = World(scheduler, random.Random(seed), fails=fails)
    world.run(requests)
    assert world.made == {request.name: list(range(request.steps)) for request in requests}
    others = max_active if sizes > 1 else math.ceil(max_active / max_rows)
    assert world.passed <= patience + others - 1
    assert (scheduler.waiting, scheduler.active, world.held) == (0, 0, set())


@settings(max_examples=80, deadline=None)
@given(
    marks=st.lists(MARKS, min_size=1, max_size=14), max_rows=st.integers(1, 5), max_active=st.integers(1, 7),
    policy=st.sampled_from(sorted(POLICIES)), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_requests_may_be_cancelled_at_any_time(marks, max_rows, max_active, policy, seed):
    requests = requests_of(marks, 2)
    scheduler = StepScheduler(max_rows=max_rows, max_active=max_active, patience=3, policy=POLICIES[policy](seed))
    world = World(scheduler, random.Random(seed), fails=0.2, cancels=0.4)
    world.run(requests)
    for request in requests:
        steps = world.made.get(request.name, [])
        assert steps == list(range(len(steps)))
        assert len(steps) == request.steps or request.name in world.cancelled
    assert (scheduler.waiting, scheduler.active, world.held) == (0, 0, set())


@pytest.mark.parametrize("policy", ["catch up", "first come"])
def test_the_same_requests_are_scheduled_the_same_way(policy):
    def trace():
        scheduler = StepScheduler(max_rows=3, max_active=5, policy=POLICIES[policy](0))
        world = World(scheduler, random.Random(1), fails=0.2, cancels=0.1)
        world.run(requests_of(["##...#", "#..", "?", "####", "##.."] * 3, 2))
        return world.trace

    assert trace() == trace()


def test_a_failed_step_is_made_again_and_says_how_often_it_failed():
    scheduler = StepScheduler()
    scheduler.submit(Request("a", "#."))
    for attempt in range(3):
        call = scheduler.next()
        assert [(row.step, row.attempt) for row in call.rows] == [(0, attempt)]
        scheduler.failed(call)
    call = scheduler.next()
    scheduler.done(call)
    assert [(row.step, row.attempt, row.last) for row in scheduler.next().rows] == [(1, 0, True)]


def test_a_place_is_given_on_when_the_engine_hears_that_it_is_free():
    scheduler = StepScheduler(max_active=1)
    for name in "abc":
        scheduler.submit(Request(name, "#"))
    first = scheduler.next()
    assert (first.names, scheduler.next().rows, scheduler.waiting) == (("a",), (), 2)
    assert scheduler.cancel("b")
    scheduler.done(first)
    assert (scheduler.active, scheduler.waiting) == (1, 1)
    second = scheduler.next()
    assert (second.over, second.names, scheduler.active) == (("a",), ("c",), 1)
    assert scheduler.cancel("c") and not scheduler.cancel("c") and not scheduler.cancel("a")
    scheduler.failed(second)
    assert scheduler.next() == cachepass.serving.Call(over=("c",))
    assert not scheduler.next()


def test_a_function_says_what_a_step_does_when_it_is_next():
    asked = []
    scheduler = StepScheduler()
    scheduler.submit(Request("a", lambda step: asked.append(step) or "#", steps=3))
    assert asked == []
    scheduler.done(scheduler.next())
    assert asked == [0, 1]

    def fails(step):
        if step:
            raise RuntimeError("no more")
        return "#"

    scheduler.submit(Request("b", fails, steps=2))
    call = scheduler.next()
    assert call.names == ("a", "b")
    with pytest.raises(RuntimeError, match="no more"):
        scheduler.done(call)
    scheduler.cancel("b")
    scheduler.done(call)  # nothing had changed
    assert [(row.name, row.step) for row in scheduler.next().rows] == [("a", 2)]


# ---- policies -------------------------------------------------------------------------------------------------------


def steps_of(policy: Policy, late: int, **options) -> list[str]:
    """What the calls do, of two requests of which one comes ``late`` calls after the other."""
    scheduler = StepScheduler(policy=policy, **options)
    scheduler.submit(Request("a", "#...#..."))
    calls = []
    while True:
        if len(calls) == late:
            scheduler.submit(Request("b", "#...#..."))
        call = scheduler.next()
        if not call.rows:
            return calls
        calls.append(" ".join(f"{row.name}{row.phase}" for row in call.rows))
        scheduler.done(call)


def test_predicted_steps_catch_up_and_computed_ones_run_together():
    assert steps_of(CatchUp(), 2) == [
        "a#", "a.", "a.", "a.", "a# b#", "a. b.", "a. b.", "a. b.", "b#", "b.", "b.", "b."
    ]  # fmt: skip
    assert steps_of(FirstCome(), 2) == ["a#", "a.", "a. b#", "a. b.", "a# b.", "a. b.", "a. b#", "a. b.", "b.", "b."]
    assert steps_of(Together(), 2, patience=None)[7:9] == ["a.", "b#"]


def test_what_gains_nothing_from_company_waits_for_nobody():
    costs = MeasuredCosts({"#": {1: 10.0, 2: 20.0}, ".": {1: 4.0, 2: 5.0}})
    scheduler = StepScheduler(policy=CatchUp(costs))
    scheduler.submit(Request("a", "#."))
    scheduler.submit(Request("b", "#.."))
    names = []
    while (call := scheduler.next()).rows:
        names.append(" ".join(f"{row.name}{row.phase}" for row in call.rows))
        scheduler.done(call)
    assert names == ["a# b#", "a. b.", "b."]
    scheduler.submit(Request("c", ".#"))
    scheduler.submit(Request("d", "#"))
    assert scheduler.next().names == ("d",)


def test_whoever_was_passed_over_often_is_called_with_those_that_do_the_same():
    scheduler = StepScheduler(patience=2)
    scheduler.submit(Request("a", "......"))
    for name in "bc":
        scheduler.submit(Request(name, "#"))
    names = []
    while (call := scheduler.next()).rows:
        names.append("".join(call.names))
        scheduler.done(call)
    assert names == ["a", "a", "bc", "a", "a", "a", "a"]


def test_as_many_rows_as_make_one_cheapest():
    """Of five rows one would run by itself, as there are programs for 1, 4 and 8."""
    costs = MeasuredCosts({"#": {1: 10.0, 4: 20.0, 8: 39.0}})
    scheduler = StepScheduler(policy=CatchUp(costs))
    for index in range(5):
        scheduler.submit(Request(f"{index}", "#"))
    assert [len(scheduler.next().rows) for _ in range(2)] == [4, 1]
    assert [costs("#", rows) for rows in (1, 2, 5, 8, 9, 13)] == [10, 20, 30, 39, 49, 69]


def test_phases_of_several_groups_cost_what_their_marks_say():
    assert typical_cost("#", 1) > typical_cost("#.", 1) > typical_cost("..", 1) == typical_cost(".", 1)
    scheduler = StepScheduler()
    scheduler.submit(Request("a", ("##", "#.", "..")))
    scheduler.submit(Request("b", ("#.", "..")))
    assert scheduler.next().names == ("b",)


# ---- threads --------------------------------------------------------------------------------------------------------


def test_an_engine_waits_for_requests_of_other_threads_and_ends_when_it_is_closed():
    scheduler, made = StepScheduler(max_active=3), []

    def engine():
        while call := scheduler.next(timeout=None):
            made.extend(row.name for row in call.rows)
            scheduler.done(call)

    thread = threading.Thread(target=engine)
    thread.start()
    clients = [
        threading.Thread(target=lambda n=n: [scheduler.submit(Request(f"{n}-{i}", "#..")) for i in range(20)])
        for n in range(4)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    deadline = time.monotonic() + 20
    while len(made) < 240 and time.monotonic() < deadline:
        time.sleep(0.01)
    scheduler.close()
    thread.join(20)
    assert not thread.is_alive()
    assert sorted(made) == sorted(f"{n}-{i}" for n in range(4) for i in range(20) for _ in range(3))
    with pytest.raises(cachepass.ConcurrencyError, match="closed"):
        scheduler.submit(Request("late", "#"))


def test_waiting_ends_after_the_seconds_given():
    assert not StepScheduler().next(timeout=0.01)


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "says"), [
    (lambda: StepScheduler(max_rows=0), "max_rows"),
    (lambda: StepScheduler(patience=0.5), "patience"),
    (lambda: Request("", "#"), "a request has a name"),
    (lambda: Request("a", ""), "0 phases"),
    (lambda: Request("a", "##", steps=3), "2 phases and 3 steps"),
    (lambda: Request("a", lambda _: "#"), "0 phases"),
    (lambda: StepScheduler().submit(Request("a", "#x")), "no cost is known"),
    (lambda: StepScheduler(policy=CatchUp(MeasuredCosts({"#": {1: 1.0}}))).submit(Request("a", "#.")), "no cost was"),
    (lambda: MeasuredCosts({}), "an entry for each phase"),
    (lambda: MeasuredCosts({"#": {0: 1.0}}), "counted from 1"),
])  # fmt: skip
def test_values_that_cannot_be_used(make, says):
    with pytest.raises(cachepass.OptionError, match=says):
        make()


def test_names_and_calls_are_told_apart():
    scheduler = StepScheduler()
    scheduler.submit(Request("a", "#"))
    with pytest.raises(cachepass.ConcurrencyError, match=r"'a'.*not over yet"):
        scheduler.submit(Request("a", "#"))
    call = scheduler.next()
    scheduler.done(call)
    for report in (scheduler.done, scheduler.failed):
        with pytest.raises(cachepass.ConcurrencyError, match="over, or"):
            report(call)


@pytest.mark.parametrize("picked", [[], "all"])
def test_a_policy_that_picks_what_cannot_be_called(picked):
    class Wrong(Policy):
        def pick(self, ready, most, due):
            return ready if picked else []

    scheduler = StepScheduler(policy=Wrong())
    for size in range(2):
        scheduler.submit(Request(f"{size}", "#", size=size))
    with pytest.raises(cachepass.OptionError, match="policy Wrong"):
        scheduler.next()


# ---- what steps will do ---------------------------------------------------------------------------------------------

TAYLOR = {"method": "taylorseer", "cache_interval": 4, "disable_cache_before_step": 3}


def test_phases_come_from_an_explanation_or_from_a_compiled_model_and_are_what_runs_do():
    model, run = transformer(), calls(11)
    phases = phases_of(cachepass.explain(model, *run[0], cache=TAYLOR), 11)
    compiled = torch.compile(
        model, backend="cached_inductor", fullgraph=True, options={"cache": TAYLOR, "lowering": "eager"}
    )
    with pytest.raises(cachepass.NotCompiledError, match="warmup"):
        phases_of(compiled, 11)
    for call in run:
        compiled(*call)
    assert "".join(phases) == cachepass.summary(compiled).last_runs["default"]["taylorseer"] == "###.#...#.."
    assert phases_of(compiled, 11) == phases
    assert phases_of(compiled, 3, timesteps=[900, 500, 100]) == ("#",) * 3
    with pytest.raises(cachepass.OptionError, match="2 timesteps for 3 steps"):
        phases_of(compiled, 3, timesteps=[900, 500])


def test_groups_and_contexts_have_a_mark_each():
    cache = {"method": "pab", "spatial_attention_block_skip_range": 2, "mlp_block_skip_range": 3,
             "spatial_attention_timestep_skip_range": (-1, 1001), "mlp_timestep_skip_range": (-1, 1001)}  # fmt: skip
    explanation = cachepass.explain(transformer(), *calls(1)[0], cache=cache)
    assert phases_of(explanation, 5) == ("##", "..", "#.", ".#", "#.")
    assert phases_of(explanation, 3, contexts=("a", "b")) == ("####", "....", "#.#.")
    decided = cachepass.explain(transformer(), *calls(1)[0], cache=cachepass.FirstBlockCacheConfig(threshold=0.1))
    assert set(phases_of(decided, 4)[1:]) == {"?"}


def test_importing_the_room_does_not_import_torch():
    code = "import sys, cachepass.serving; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# ---- simulation -----------------------------------------------------------------------------------------------------

SECONDS = MeasuredCosts({"#": {1: 4.0, 2: 6.0}, ".": {1: 1.0, 2: 1.5}})


def test_a_simulation_by_hand():
    """a: # at 0-4, . at 4-5 (b arrives at 4.5), then # of a and b together until 11, a is over; b: . at 11-12."""
    traffic = [(0.0, Request("a", "#.#")), (4.5, Request("b", "#."))]
    found = simulate(traffic, StepScheduler(max_rows=2, policy=CatchUp(SECONDS)), SECONDS)
    assert found.latencies == (11.0, 7.5)
    assert (found.seconds, found.busy, found.calls, found.rows) == (12.0, 12.0, 4, 5)
    assert found.throughput == pytest.approx(2 / 12)
    assert found.percentile(50) == 7.5 and found.percentile(51) == found.percentile(99) == 11.0
    assert "2 requests, 0.167 per second; latency p50 7.5 s" in str(found)


def test_the_engine_is_idle_until_somebody_comes():
    traffic = [(1.0, Request("a", "#")), (20.0, Request("b", "#"))]
    found = simulate(traffic, StepScheduler(), SECONDS, per_call=0.5)
    assert (found.latencies, found.seconds, found.busy) == ((4.5, 4.5), 23.5, 9.0)


def test_phases_of_one_call_run_one_after_the_other():
    traffic = [(0.0, Request("a", "#.")), (0.0, Request("b", ".#"))]
    found = simulate(traffic, StepScheduler(policy=FirstCome()), SECONDS)
    assert (found.latencies, found.calls) == ((10.0, 10.0), 2)


def test_one_at_a_time_and_together():
    requests = [Request(name, "#.") for name in "abc"]
    one = simulate(arrivals(requests, math.inf), StepScheduler(max_rows=1, max_active=1), SECONDS)
    assert one.latencies == (5.0, 10.0, 15.0)
    batches = StepScheduler(max_rows=2, max_active=2, policy=Together(), patience=None)
    assert simulate(arrivals(requests, math.inf), batches, SECONDS).latencies == (7.5, 7.5, 12.5)


def test_nobody_came():
    found = simulate([], StepScheduler(), SECONDS)
    assert (found.latencies, found.seconds, found.rows_per_call, found.throughput) == ((), 0.0, 0.0, math.inf)


def test_arrivals_are_random_and_repeatable():
    requests = [Request(f"{index}", "#") for index in range(2000)]
    times = [now for now, _ in arrivals(requests, 4.0, seed=1)]
    assert times == [now for now, _ in arrivals(requests, 4.0, seed=1)] == sorted(times)
    assert times != [now for now, _ in arrivals(requests, 4.0, seed=2)]
    assert times[-1] == pytest.approx(2000 / 4.0, rel=0.1)


def test_grouping_pays_where_a_call_costs_more_than_its_rows():
    requests = [Request(f"{index}", "##." + "#..." * 4 + "#") for index in range(500)]
    cost = MeasuredCosts({"#": {n: 3.0 + n for n in range(1, 9)}, ".": {n: 0.5 + 0.1 * n for n in range(1, 9)}})

    def found(policy):
        return simulate(arrivals(requests, 0.07), StepScheduler(max_active=8, policy=policy), cost)

    catching, first = found(CatchUp(cost)), found(FirstCome())
    assert catching.busy < 0.9 * first.busy
    assert catching.percentile(95) < first.percentile(95)


def test_the_benchmark_compares_servers_under_the_same_traffic(monkeypatch):
    """Calls of two rows cost as much as of one, and a predicted step a tenth of a computed one."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    serving, costs = importlib.import_module("serving"), importlib.import_module("serving_costs")
    computed, both = {"#": {1: 1.0, 2: 1.0}}, {"#": {1: 1.0, 2: 1.0}, ".": {1: 0.1, 2: 0.1}}
    measured = costs.Costs(
        {"plain": computed, "alone": {phase: {1: by[1]} for phase, by in both.items()}, "rows": both},
        {way: {4: tuple("####" if way == "plain" else "#...")} for way in ("plain", "alone", "rows")},
    )
    assert costs.Costs.from_json(json.loads(json.dumps(measured.as_json()))) == measured
    rows = serving.compared(measured, (0.5,), 200, 0)
    assert [row["server"] for row in rows] == 2 * list(serving.SERVERS)
    most = {row["server"]: row["throughput"] for row in rows[len(serving.SERVERS) :]}
    assert most["no cache"] == pytest.approx(2 / 4)
    assert most["one at a time"] == pytest.approx(1 / 1.3)
    assert most["static batches"] == most["rows"] == most["rows, FIFO"] == pytest.approx(2 / 1.3)
    slow, fast = rows[0], rows[list(serving.SERVERS).index("rows")]
    assert slow["load"] == fast["load"] and fast["p95"] < 0.5 * slow["p95"] and fast["busy"] < 0.6 * slow["busy"]
