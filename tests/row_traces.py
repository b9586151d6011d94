"""Requests that join and leave calls of several, and what each of them gets alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import zoo
from torch import fx

import cachepass
from cachepass.program.rows.once import in_every_step

# Inputs that are the same for all requests, in the zoo's models.
SHARED = {"img_ids", "txt_ids", "image_rotary_emb"}

Inputs = dict[str, Any]


def one_request(name: str, seed: int) -> Inputs:
    """The inputs of one call of one request; those that requests share have the values of seed 1."""
    given, first = zoo.inputs_of(name, seed), zoo.inputs_of(name, 1)
    batch = len(next(given[key] for key in ("hidden_states", "x", "input_ids") if key in given))
    return {key: _first_of(key, first[key] if key in SHARED else value, batch) for key, value in given.items()}


def _first_of(key: str, value: Any, batch: int) -> Any:
    """What is given for one sample of a batch."""
    if isinstance(value, dict):
        return {name: _first_of(name, item, batch) for name, item in value.items()}
    if isinstance(value, list):
        return value[:1] if len(value) == batch and key not in SHARED else value
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or (key in SHARED and value.ndim == 2):
        return value
    return value[: len(value) // batch] if len(value) % batch == 0 else value


def together(requests: Sequence[Inputs]) -> Inputs:
    """One call's inputs for several requests."""
    return {key: _together(key, [request[key] for request in requests]) for key in requests[0]}


def _together(key: str, values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {name: _together(name, [value[name] for value in values]) for name in first}
    if isinstance(first, list) and key in SHARED:
        return first
    if isinstance(first, list):
        return [item for value in values for item in value]
    if not isinstance(first, torch.Tensor) or first.ndim == 0 or (key in SHARED and first.ndim == 2):
        return first
    return torch.cat(values)


def steps_of(name: str, seed: int, steps: int) -> Iterator[Inputs]:
    """The calls of one request: the latents change smoothly with some noise, the timestep falls from 950."""
    base, clock = one_request(name, seed), zoo.clock_of(name)
    latents = next(key for key in ("hidden_states", "x", "input_ids") if key in base)
    generator = torch.Generator().manual_seed(100 + seed)

    def move(value: Any, step: int) -> Any:
        if isinstance(value, list):
            return [move(item, step) for item in value]
        return value * (1 - 0.03 * step) + 0.05 * torch.randn(value.shape, generator=generator)

    for step in range(steps):
        call = {**base, latents: move(base[latents], step)}
        if clock is not None:
            timestep, like = 950.0 - 880.0 * step / steps, base[clock]
            scaled = timestep / zoo.timestep_scale(name) if like.is_floating_point() else int(timestep)
            call[clock] = torch.full_like(like, scaled)
        yield call


def samples(result: Any, count: int) -> list[torch.Tensor]:
    """A model's result, by sample."""
    while not isinstance(result, torch.Tensor):
        if isinstance(result, list) and len(result) == count and isinstance(result[0], torch.Tensor):
            return result
        result = result[0]
    return list(result.chunk(count)) if result.ndim else [result] * count


@dataclass
class Request:
    """One request on its way.

    Attributes:
        alone: What its calls return where nobody else is in them.
    """

    name: str
    calls: list[Inputs]
    alone: list[torch.Tensor]
    made: int = 0

    @property
    def is_over(self) -> bool:
        return self.made == len(self.calls)


def request(model: Callable[..., Any], name: str, calls: Sequence[Inputs], **further: Any) -> Request:
    """A request, and what it gets alone, in a context of its own."""
    alone = []
    with cachepass.cache_context(f"{name} alone"):
        for call in calls:
            alone.append(samples(model(**call, **further), 1)[0].clone())
    return Request(name, list(calls), alone)


@dataclass
class Server:
    """Calls a model for several requests at once, and compares what each gets.

    Attributes:
        worst: The largest relative error of a row so far.
        calls: How many rows each call had.
    """

    model: Callable[..., Any]
    further: Inputs = field(default_factory=dict)
    worst: float = 0.0
    calls: list[int] = field(default_factory=list)

    def step(self, requests: Sequence[Request], **rows: Any) -> None:
        """One step of each."""
        given = together([one.calls[one.made] for one in requests])
        with cachepass.rows(*(one.name for one in requests), **rows):
            result = self.model(**given, **self.further)
        self.calls.append(len(requests))
        for one, value in zip(requests, samples(result, len(requests)), strict=True):
            self.worst = max(self.worst, zoo.relative_error(value, one.alone[one.made]))
            one.made += 1
            if one.is_over:
                cachepass.release(one.name)

    def serve(self, requests: Sequence[Request], begins: Sequence[int], most: int = 4) -> None:
        """All requests to their ends, ``most`` at once; each begins at its tick or later."""
        waiting, active, tick = sorted(zip(begins, range(len(requests)), strict=True)), list[Request](), 0
        while waiting or active:
            while waiting and waiting[0][0] <= tick and len(active) < most:
                active.append(requests[waiting.pop(0)[1]])
            tick += 1
            if active:
                self.step(active)
            active = [one for one in active if not one.is_over]


# ---- programs -------------------------------------------------------------------------------------------------------


def products(graph: fx.Graph) -> Counter[str]:
    """Matrix products and attentions of a graph."""
    found: Counter[str] = Counter()
    for node in graph.nodes:
        name = str(node.target)
        found["attention"] += "scaled_dot_product" in name
        found["product"] += name.split(".")[1:2] in (["mm"], ["addmm"], ["bmm"], ["baddbmm"], ["convolution"])
    return found


def assert_as_many_products(program: Any, rows: Any) -> None:
    """Programs for three rows have as many products and attentions as those for one that compute the same."""
    variants = [(program.variant(phase), phase.route) for phase in program.plan.phases]
    variants += [(program.decision(route), route) for _, route in variants[:1] if program.splits(route)]
    for variant, route in variants:
        traced = program.traced(route)
        graph = rows.graph(variant, traced, 3)
        alone = in_every_step(variant, traced, rows._kinds(traced).every_step)
        assert products(graph.gm.graph) == products(alone.gm.graph), variant.name
