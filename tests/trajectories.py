"""Ways of calling a denoiser: for every call what it is given, what is said about it, and whose step it truly is.

A trajectory is one latent's way through one run under one conditioning; its name here ends with the number of the run.
A scenario yields one call after the other, so that tensors of a run that is over are gone when the next one begins:
what has their addresses later is something else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

import cachepass

TIMES = tuple(range(900, 270, -70))  # nine steps
Said = Callable[[Any], AbstractContextManager[Any]]


def nothing(_: Any) -> AbstractContextManager[Any]:
    return contextlib.nullcontext()


def left_open(name: str, **told: Any) -> Said:
    """What diffusers says of a call, and nobody takes back: it holds until something else is said."""

    @contextlib.contextmanager
    def say(model: Any) -> Iterator[None]:
        from diffusers.hooks.hooks import CacheContext, _set_cache_context

        _set_cache_context(model, CacheContext(name, **told))
        yield

    return say


def named(name: str) -> Said:
    return lambda _: cachepass.cache_context(name)


def by_diffusers(name: str, **told: Any) -> Said:
    return lambda model: model.cache_context(name, **told)


@dataclass(frozen=True)
class Call:
    """One call of the denoiser.

    Attributes:
        trajectory: Whose step it is.
        inputs: Latents, timestep, prompt and, perhaps, the flag.
        said: What the caller opens around it.
        step: Of its run, where the trajectory has not made all of the run's steps.
    """

    trajectory: str
    inputs: tuple[Any, ...]
    said: Said = nothing
    step: int | None = None


Calls = Iterator[Call]
Scenario = Callable[[], Calls]


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prompt(seed: int, batch: int = 1, tokens: int = 3) -> torch.Tensor:
    return noise(1000 + seed, batch, tokens, 8)


def latents(
    seed: int, times: Sequence[float] = TIMES, batch: int = 1, tokens: int = 4
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Latents and timestep of every step: they change smoothly, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, 8, generator=generator)
    for step, time in enumerate(times):
        new = 0.05 * torch.randn(x.shape, generator=generator)
        yield x * (1 - 0.04 * step) + new, torch.full((batch,), float(time))


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def guided(
    run: int,
    prompts: Sequence[torch.Tensor],
    times: Sequence[float] = TIMES,
    saids: Sequence[Said] = (nothing, nothing),
    given: Callable[[torch.Tensor], torch.Tensor] = same,
    tokens: int = 4,
) -> Calls:
    """A run with as many calls per step as prompts: of the same latents, and timesteps made for each call."""
    for x, t in latents(run, times, tokens=tokens):
        for call, (embeddings, said) in enumerate(zip(prompts, saids, strict=False)):
            yield Call(f"{call}@{run}", (x, t.clone(), given(embeddings)), said)


# ---- one call per step ----------------------------------------------------------------------------------------------


def one_call_with_a_batch() -> Calls:
    """Both halves of guidance in one call, their prompts as one tensor; the second run has another one."""
    for run in range(2):
        both = prompt(run, batch=2)
        for x, t in latents(run, batch=2):
            yield Call(f"both@{run}", (x, t, both))


def batches_in_between() -> Calls:
    """Guidance for the middle of the run only: one sample, two, and one again. The run goes on, as do its steps."""
    one, two = prompt(0), prompt(1, batch=2)
    for run in range(2):
        steps = zip(latents(run), latents(run, batch=2), strict=True)
        for step, ((x, t), (xx, tt)) in enumerate(steps):
            inputs, name = ((xx, tt, two), "two") if 3 <= step < 7 else ((x, t, one), "one")
            yield Call(f"{name}@{run}", inputs, step=step)


def image_to_image() -> Calls:
    """A whole run, then two that begin in the middle, above where the one before ended."""
    for run, times in enumerate((TIMES, TIMES[4:], TIMES[4:])):
        yield from guided(run, [prompt(min(run, 1))], times)


def one_call_before_a_run() -> Calls:
    """The very first call, in which graphs are captured, is a run by itself: what follows begins above it."""
    shared = prompt(0)
    yield from guided(0, [shared], TIMES[-1:])
    yield from guided(1, [shared])


def one_step_model() -> Calls:
    """Eight images in one step each, with a prompt each, all at the same timestep."""
    for image in range(8):
        yield from guided(image, [prompt(image)], [999.0])


def cancelled() -> Calls:
    """A run that stops after its fourth step, and another image's that begins below."""
    yield from guided(0, [prompt(0)], TIMES[:4])
    yield from guided(1, [prompt(1)], [*TIMES[4:], 200, 130, 60])


# ---- several calls per step -----------------------------------------------------------------------------------------


def contexts() -> Calls:
    prompts = [prompt(0), prompt(1)]
    for run in range(2):
        yield from guided(run, prompts, saids=[named("cond"), named("uncond")])


def nested_contexts() -> Calls:
    """Two requests that take turns, each with both calls of its step."""
    steps = []
    for request in (1, 2):
        prompts = [prompt(10 * request), prompt(10 * request + 1)]
        steps.append(guided(request, prompts, saids=[_inside(request, "cond"), _inside(request, "uncond")]))
    for both in zip(*steps, strict=True):
        yield from both


def _inside(request: int, name: str) -> Said:
    @contextlib.contextmanager
    def open_both(model: Any) -> Iterator[None]:
        with cachepass.cache_context(f"request-{request}"), model.cache_context(name):
            yield

    return open_both


def contexts_of_diffusers() -> Calls:
    """With all that ``CacheContext`` has."""
    prompts = [prompt(0), prompt(1)]
    for run in range(2):
        for step, (x, t) in enumerate(latents(run)):
            place = {"step_index": step, "num_inference_steps": len(TIMES), "timestep": t[0], "sigma": t[0] / 1000}
            for call, name in enumerate(("cond", "uncond")):
                yield Call(f"{name}@{run}", (x, t, prompts[call]), by_diffusers(name, **place))


def contexts_left_open() -> Calls:
    """A loop that says which step it is in and closes no context; then one that says nothing but names."""
    prompts = [prompt(0), prompt(1)]
    for step, (x, t) in enumerate(latents(0)):
        for call, name in enumerate(("cond", "uncond")):
            yield Call(f"{name}@0", (x, t, prompts[call]), left_open(name, step_index=step, timestep=t[0]))
    yield from guided(1, prompts, saids=[left_open("cond"), left_open("uncond")])
    yield from guided(2, prompts, saids=[by_diffusers("cond"), by_diffusers("uncond")])


def silent() -> Calls:
    """Two calls that nobody names, with the same two prompts in every step; another image, and other prompts."""
    for run in range(3):
        prompts = [prompt(0), prompt(1)] if run % 2 == 0 else prompts  # noqa: F821
        yield from guided(run, prompts)


def silent_of_different_lengths() -> Calls:
    """The negative prompt is shorter: another size, another graph."""
    prompts = [prompt(0, tokens=5), prompt(1, tokens=2)]
    for run in range(2):
        yield from guided(run, prompts)


def silent_views() -> Calls:
    """Both prompts are views of one tensor, taken anew in every call."""
    both = prompt(0, batch=2)
    for run in range(2):
        for x, t in latents(run):
            for call in range(2):
                yield Call(f"{call}@{run}", (x, t, both[call : call + 1]))


def made_anew() -> Calls:
    """Two calls that nobody names, with prompts that are copied in every step."""
    for run in range(2):
        yield from guided(run, [prompt(0), prompt(1)], given=torch.clone)


def three_guiders() -> Calls:
    """Conditional, unconditional, and the conditional call once more with a perturbed model."""
    prompts = [prompt(0), prompt(1)]
    for run in range(2):
        for x, t in latents(run):
            yield Call(f"cond@{run}", (x, t, prompts[0], False))
            yield Call(f"uncond@{run}", (x, t, prompts[1], False))
            yield Call(f"perturbed@{run}", (x, t, prompts[0], True))


def guidance_ends() -> Calls:
    """The unconditional call is left out from the sixth step on; the next run makes it again."""
    prompts = [prompt(0), prompt(1)]
    for run in range(2):
        for step, both in enumerate(_steps(guided(run, prompts), 2)):
            yield from both if step < 5 else both[:1]


def guidance_begins_late() -> Calls:
    """The unconditional call comes first in its step, from the third step on."""
    prompts = [prompt(0), prompt(1)]
    for run in range(2):
        for step, both in enumerate(_steps(guided(run, prompts), 2)):
            yield from both if step >= 2 else both[1:]


def _steps(calls: Calls, count: int) -> Iterator[list[Call]]:
    while step := [call for _, call in zip(range(count), calls, strict=False)]:
        yield step


def hires_fix() -> Calls:
    """Both calls of a small image, then of a large one from the middle of the schedule on; and once more."""
    for image in range(2):
        prompts = [prompt(2 * image), prompt(2 * image + 1)]
        yield from guided(2 * image, prompts)
        yield from guided(2 * image + 1, prompts, TIMES[4:], tokens=8)


def cancelled_of_two_calls() -> Calls:
    """Cancelled between the two calls of its fourth step; the next image's run begins below."""
    first = list(guided(0, [prompt(0), prompt(1)], TIMES[:4]))
    yield from first[:-1]
    del first
    yield from guided(1, [prompt(2), prompt(3)], [*TIMES[4:], 200, 130, 60])


def image_to_image_of_two_calls() -> Calls:
    for run, times in enumerate((TIMES, TIMES[4:], TIMES)):
        yield from guided(run, [prompt(0), prompt(1)], times)


def one_step_model_of_two_calls() -> Calls:
    for image in range(4):
        yield from guided(image, [prompt(2 * image), prompt(2 * image + 1)], [999.0])


# ---- where only the caller can know ---------------------------------------------------------------------------------


def one_prompt_in_one_step() -> Calls:
    """Eight images of one prompt, in one step each: the same conditioning at the same timestep."""
    shared = prompt(0)
    for image in range(8):
        yield from guided(image, [shared], [999.0])


def second_order() -> Calls:
    """As Heun's method samples: every timestep but the first twice, with other latents."""
    for run in range(2):
        yield from guided(run, [prompt(run)], _twice(TIMES))


def second_order_of_two_calls() -> Calls:
    for run in range(2):
        yield from guided(run, [prompt(2 * run), prompt(2 * run + 1)], _twice(TIMES))


def _twice(times: Sequence[float]) -> list[float]:
    return [times[0], *(time for time in times[1:] for _ in range(2))]


def two_images_of_one_prompt() -> Calls:
    """Two latents that take turns under one conditioning."""
    shared = prompt(0)
    for both in zip(guided(0, [shared]), guided(1, [shared]), strict=True):
        yield from both


def two_named_images_of_one_prompt() -> Calls:
    """The same, with the line that the warning asks for."""
    shared = prompt(0)
    runs = [guided(image, [shared], saids=[named(f"image {image}")]) for image in range(2)]
    for both in zip(*runs, strict=True):
        yield from both


# ---- with the number of steps ---------------------------------------------------------------------------------------


def longer_than_said() -> Calls:
    """Eleven steps where nine were said: the tenth is the first of another run."""
    for run in range(0, 4, 2):
        times = [*TIMES, 270, 200]
        for step, call in enumerate(guided(run, [prompt(0)], times)):
            yield Call(f"0@{run + (step >= 9)}", call.inputs)


def shorter_than_said() -> Calls:
    """Six steps where nine were said, then nine: a rise is another run's."""
    for run, steps in enumerate((6, 9, 6)):
        yield from guided(run, [prompt(0), prompt(1)], TIMES[:steps])


def aborted_before_what_was_said() -> Calls:
    """Four steps of nine; then another image's, whose timesteps begin below."""
    yield from guided(0, [prompt(0), prompt(1)], TIMES[:4])
    yield from guided(1, [prompt(2), prompt(3)], [*TIMES[4:], 250, 200, 150, 100])


TWO = {"default", "call 2"}
# Told apart by what the calls are given, or by what is said; with the contexts that summaries show in the end. None: it
# depends on what was seen first (a run that was cancelled is found to be over when another one begins).
TOLD_APART: dict[Scenario, set[str] | None] = {
    one_call_with_a_batch: {"default"},
    batches_in_between: {"default"},
    image_to_image: {"default"},
    one_call_before_a_run: {"default"},
    cancelled: None,
    contexts: {"cond", "uncond"},
    nested_contexts: {f"request-{request}/{name}" for request in (1, 2) for name in ("cond", "uncond")},
    contexts_of_diffusers: {"cond", "uncond"},
    contexts_left_open: {"cond", "uncond"},
    silent: TWO,
    silent_of_different_lengths: TWO,
    silent_views: TWO,
    three_guiders: {*TWO, "call 3"},
    guidance_ends: TWO,
    guidance_begins_late: None,
    hires_fix: TWO,
    cancelled_of_two_calls: None,
    image_to_image_of_two_calls: TWO,
    two_named_images_of_one_prompt: {"image 0", "image 1"},
}
# With prompts that are other tensors in every step, it is known after two steps only that they are not another image's.
ANEW: tuple[Scenario, ...] = (made_anew,)
# Every call is the first of its trajectory.
ONE_STEP: tuple[Scenario, ...] = (one_step_model, one_step_model_of_two_calls, one_prompt_in_one_step)
# Nothing that the calls are given says whether they are one latent's steps or two latents'.
UNDECIDED: tuple[Scenario, ...] = (second_order, second_order_of_two_calls, two_images_of_one_prompt)
# With num_inference_steps=9.
COUNTED: tuple[Scenario, ...] = (longer_than_said, shorter_than_said, aborted_before_what_was_said)
