"""Host time per step that caching adds to the call of a compiled graph, by the number of cuts.

    python benchmarks/host.py
    python benchmarks/host.py --cuts 150 --rounds 21

A model of n small attention blocks, compiled with Inductor; every block's attention is a cut. What is timed is the
callable that Dynamo calls for the graph, less what the compiled programs themselves take in it: what remains is
AOTAutograd's wrapper and, for cachepass, clock, schedule, weights, slots and commit. The difference of the two is the
cache's own. Each cached model takes turns with the plain one, run by run; medians over all steps of a phase.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from report import Column, publish
from subjects import TAYLOR
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

from cachepass.run.dispatch import Dispatcher
from cachepass.run.live import programs_of

STEPS = 12
METHODS: dict[str, dict[str, Any]] = {
    "taylorseer": {
        "method": "taylorseer",
        **TAYLOR,
        "cache_identifiers": [r"blocks\.\d+\.attn"],
        "taylor_factors_dtype": None,
    },
    "pab": {"method": "pab", "spatial_attention_timestep_skip_range": (0, 1000)},
}
COLUMNS: tuple[Column, ...] = (
    ("cuts", "cuts", str), ("method", "method", str), ("runs told by", "told", str), ("phase", "phase", str),
    ("AOTAutograd us", "aot", lambda v: f"{v:.0f}"), ("cachepass us", "whole", lambda v: f"{v:.0f}"),
    ("the cache's own us", "own", lambda v: f"{v:.0f}"),
)  # fmt: skip


class Attention(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(self.to_q(x), self.to_k(x), self.to_v(x))


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = Attention(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attn(x)


class Model(torch.nn.Module):
    def __init__(self, cuts: int, width: int = 8) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block(width) for _ in range(cuts))

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = hidden_states * (1 + timestep[:, None, None])
        for block in self.blocks:
            x = block(x)
        return x


class Timed:
    """A callable that adds up the time spent in it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return self.function(*args)
        finally:
            self.seconds += time.perf_counter() - start


class Subject:
    """A compiled model, the time of its last step in the graph's callable, and in the programs that it runs."""

    def __init__(self, model: Callable[..., Any], outer: Timed, inner: dict[str, Timed]) -> None:
        self.model, self.outer, self.inner, self.phase = model, outer, inner, ""

    def step(self, inputs: tuple[torch.Tensor, ...]) -> float:
        """Host seconds of a step, less the programs'."""
        timers = [self.outer, *self.inner.values()]
        for timer in timers:
            timer.seconds = 0.0
        self.model(*inputs)
        self.phase = next(name for name, timer in self.inner.items() if timer.seconds)
        return self.outer.seconds - sum(timer.seconds for timer in self.inner.values())


def plain(cuts: int) -> Subject:
    """The same graph under Inductor alone."""
    inner: dict[str, Timed] = {}
    outer: list[Timed] = []

    def program(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        inner["compute"] = Timed(compile_fx_inner(gm, inputs, **kwargs))

        def boxed(inputs: list[Any]) -> Any:
            return inner["compute"](inputs)

        boxed._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]
        return boxed

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        with functorch_config.patch(enable_autograd_cache=False):  # a hit would bypass the timer
            outer.append(Timed(compile_fx(gm, inputs, inner_compile=program)))
        return outer[-1]

    torch.manual_seed(0)
    compiled = torch.compile(Model(cuts).eval(), backend=backend, fullgraph=True)
    compiled(*inputs_of(0))
    return Subject(compiled, outer[-1], inner)


def cached(cuts: int, method: str, *, counted: bool) -> Subject:
    """``counted``: the runs are told apart by counting, so a timestep is read only where the schedule needs it."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"cache": METHODS[method]}
    options |= {"num_inference_steps": STEPS} if counted else {}
    compiled = torch.compile(Model(cuts).eval(), backend="cached_inductor", fullgraph=True, options=options)
    for step in range(STEPS):
        compiled(*inputs_of(step))
    dispatcher, _ = next(programs_of(compiled))
    assert dispatcher.program is not None
    assert len(dispatcher.program.plan.live_cuts) == cuts
    inner: dict[str, Timed] = {}
    for name, variant in dispatcher.program.variants.items():
        inner[name] = Timed(variant.run)
        object.__setattr__(variant, "run", inner[name])
    outer = Timed(functools.partial(Dispatcher.__call__, dispatcher))
    _OUTER[dispatcher], dispatcher.__class__ = outer, _TimedDispatcher
    return Subject(compiled, outer, inner)


_OUTER: dict[Dispatcher, Timed] = {}


class _TimedDispatcher(Dispatcher):
    """Dynamo calls a dispatcher by its class's ``__call__``."""

    def __call__(self, *inputs: Any) -> Any:
        return _OUTER[self](*inputs)


def inputs_of(step: int) -> tuple[torch.Tensor, ...]:
    return torch.ones(1, 4, 8), torch.tensor([float(STEPS - step)])


@click.command()
@click.option("--cuts", "sizes", multiple=True, type=int, default=(10, 50, 150), show_default=True)
@click.option("--rounds", default=21, show_default=True)
@click.option("--out", default=None, type=click.Path(path_type=Path), help="JSON file to write.")
def main(sizes: tuple[int, ...], rounds: int, out: Path | None) -> None:
    """Measure, print the markdown table; with --out, write the JSON."""
    rows = []
    for cuts in sizes:
        for method in METHODS:
            for counted in (True, False):
                torch._dynamo.reset()  # its limit of compilations counts all subjects together, which share their code
                with torch.no_grad():
                    plain_us, own = measure(plain(cuts), cached(cuts, method, counted=counted), rounds)
                told = "counting" if counted else "the timestep"
                rows += [
                    {
                        "cuts": cuts,
                        "method": method,
                        "told": told,
                        "phase": phase,
                        "aot": plain_us,
                        "whole": us,
                        "own": us - plain_us,
                    }
                    for phase, us in own.items()
                ]
    results = {"host time per step": rows}
    publish(results, COLUMNS, "cpu", "torch.float32", out)


def measure(base: Subject, subject: Subject, rounds: int) -> tuple[float, dict[str, float]]:
    """Median microseconds of the plain model, and of the cached one by phase."""
    plain_us: list[float] = []
    own: dict[str, list[float]] = {}
    for _ in range(rounds):
        plain_us += [1e6 * base.step(inputs_of(step)) for step in range(STEPS)]
        for step in range(STEPS):
            seconds = subject.step(inputs_of(step))
            own.setdefault(subject.phase, []).append(1e6 * seconds)
    return statistics.median(plain_us), {phase: statistics.median(values) for phase, values in own.items()}


if __name__ == "__main__":
    main()
