"""``cachepass.tune``: a budget in, the best schedule and weights out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import OptionError
from ..recipe.cut import Cut
from ..recipe.forecast import ForecastRule
from .cuts import CUTS
from .tuning import Tuning
from .work import Work


def tune(
    model: Any,
    sample: Callable[[Any, int], Any],
    *,
    steps: int | Sequence[int] | None = None,
    quality: float | Callable[[Any, Any], bool] | None = None,
    runs: int = 2,
    validate: int = 2,
    num_inference_steps: int | None = None,
    cut: Cut | None = None,
    forecasts: Sequence[ForecastRule] | None = None,
    max_bytes: int | None = None,
    tries: int = 40,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Tuning:
    """Find the best cache for a model, its sampler and a budget.

    An uncached run of a few samples tells what the steps have to do with each other; from that come schedules and
    weights, and runs of the loop itself say which is best. Fixed methods (reuse, Taylor, Hermite, on evenly spread
    steps and cache-dit's masks) are tried too, so the result is not worse than they are on the calibration runs.

    Args:
        model: A module that is not compiled, or a pipeline of diffusers with one transformer.
        sample: ``sample(model, run)`` makes one whole generation, of the seed or prompt number ``run``, with what it is
            given for ``model``, and returns a tensor, images, or what a pipeline returns.
        steps: How many steps may be computed: one number, or several.
        quality: PSNR in decibels to be reached, against the uncached result, with as few computed steps as can; or a
            function of a result and the uncached one that says whether it is good enough.
        runs: Generations to calibrate with: ``run`` is 0 to ``runs - 1``.
        validate: Generations that come after those, to measure the result with; 0: none.
        num_inference_steps: Calls per run, where they are known: a run of another length is an error then.
        cut: Where; None: whichever of some is best.
        forecasts: Fixed forecasts to try; None: reuse, Taylor(1), Taylor(2), Hermite(2).
        max_bytes: The most that may be kept from step to step, in each trajectory.
        tries: Runs for refining each budget's best.
        options: Further options of the backend.
        progress: Show a progress bar, and what it costs.

    Returns:
        What was found. Ctrl-C ends the search, and what was found until then is returned.

    Raises:
        OptionError: A budget makes no sense, or the loop does not return the same for the same run.
        CachepassError: The model cannot be cached at all.
    """
    budgets = _budgets(steps, quality)
    _check_loop(sample, runs, validate)
    work = Work(model, sample, runs, validate, dict(options or {}), forecasts, max_bytes, tries, num_inference_steps)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress, transient=True) as bar, _interruptible(work):
        work.bar, work.task = bar, bar.add_task("", total=None)
        work.record((cut,) if cut is not None else CUTS)
        work.plan(budgets)
        if quality is not None:
            work.reach(quality)
        for count in budgets:
            work.search(count)
    return work.tuning()


def _check_loop(sample: Callable[..., Any], runs: int, validate: int) -> None:
    if runs < 1 or validate < 0:
        raise OptionError(f"{runs} runs, and {validate} to validate", where="tune", hint="one run at least")
    try:
        inspect.signature(sample).bind(None, 0)
    except TypeError as error:
        raise OptionError(
            f"sample cannot be called with a model and the number of a run: {error}",
            where="tune.sample",
            hint="def sample(model, run): ..., where run says which seed or prompt",
        ) from None
    except ValueError:  # of something built in nobody knows
        return


def _budgets(steps: int | Sequence[int] | None, quality: object) -> list[int]:
    if (steps is None) == (quality is None):
        raise OptionError(
            "give steps or quality, one of them",
            where="tune",
            hint="tune(model, sample, steps=10), or quality=35.0 for decibels",
        )
    budgets: list[Any] = [] if steps is None else list(steps) if isinstance(steps, (list, tuple, range)) else [steps]
    for count in budgets:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise OptionError(f"{count!r} computed steps", where="tune.steps", hint="one step at least is computed")
    if steps is not None and not budgets:
        raise OptionError("no number of steps is given", where="tune.steps", hint="steps=10, or steps=[8, 10, 13]")
    return sorted(set(budgets))


@contextmanager
def _interruptible(work: Work) -> Iterator[None]:
    """Ctrl-C ends what is inside; with nothing found it goes on its way."""
    try:
        yield
    except KeyboardInterrupt:
        if not any(found.best is not None for found in work.found.values()):
            raise
        work.notes.append("interrupted: what was found until then")
