"""``cachepass compare``: a user's own sampling loop, with caches and without: time, work, memory, and what it costs.

All subjects sample in turn, so that what else happens on the machine meets all of them; ratios are taken within a round
and medians over rounds. Results are compared with those of the model without a cache, from the same noise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from .. import _torch
from ..config import MethodConfig, parse_cache
from ..errors import CachepassError, OptionError
from ..options import parse_options
from ..program.progress import shown_elsewhere
from ..run.live import denoisers_of, forget, standing_in
from .results import as_pictures, as_tensor, psnr, relative_error
from .summary import Summary, summary
from .tables import human_bytes, table

UNCACHED = "uncached"
_REPEATABLE = 1e-2  # relative error of the uncached loop to itself: kernels of a GPU may add in another order


@dataclass(frozen=True)
class Compared:
    """One subject's figures.

    Attributes:
        name: ``"uncached"``, or the method and what differs from its defaults.
        config: None: no cache.
        seconds: One call of the sampling loop; median over rounds.
        speedup: Uncached seconds over these, within a round; median.
        predicted: Share of the steps in which a group was predicted, over all groups, 0 to 1.
        flops: Share of the uncached FLOPs; None: unknown, because sizes depend on data.
        psnr: Decibels against the uncached result; infinite where both are equal.
        error: Relative L2 distance to the uncached result.
        kept_bytes: What was kept from step to step at the end of the loop.
        compile_seconds: The first call of the loop less a later one.
        best: No other subject is both faster and closer to the uncached result.
        failed: Why there are no figures: the message of the error.
    """

    name: str
    config: MethodConfig | None = None
    seconds: float | None = None
    speedup: float | None = None
    predicted: float = 0.0
    flops: float | None = 1.0
    psnr: float | None = None
    error: float | None = None
    kept_bytes: int = 0
    compile_seconds: float | None = None
    best: bool = False
    failed: str | None = None


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        rows: Uncached first, then the configs in their order.
        results: What the sampling loop returned, for the rows that have figures, by their names.
        warnings: What was warned of, by the rows' names.
    """

    rows: tuple[Compared, ...]
    results: Mapping[str, Any] = field(repr=False)
    warnings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def fastest(self, *, psnr: float | None = None, error: float | None = None) -> Compared:
        """The fastest row that is at least so good: decibels, or a relative error.

        Raises:
            OptionError: No config is.
        """
        good = [
            row
            for row in self.rows
            if row.config is not None
            and row.seconds is not None
            and (psnr is None or (row.psnr or 0.0) >= psnr)
            and (error is None or (row.error if row.error is not None else float("inf")) <= error)
        ]
        if not good:
            raise OptionError(
                "no config is as good as that",
                where="Comparison.fastest",
                hint=", ".join(f"{row.name}: {_decibels(row.psnr)} dB" for row in self.rows if row.config is not None)
                or "give caches to compare",
            )
        return min(good, key=lambda row: row.seconds or 0.0)

    def as_dict(self) -> list[dict[str, Any]]:
        """The figures as plain values, configs as they are saved (None: they hold a function)."""
        rows = []
        for row in self.rows:
            saved: dict[str, Any] | None = None
            if row.config is not None:
                with contextlib.suppress(CachepassError):
                    saved = row.config.to_dict()
            figures = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
            finite = None if row.psnr == float("inf") else row.psnr  # JSON has no infinity
            warned = list(self.warnings.get(row.name, ()))
            rows.append(figures | {"config": saved, "psnr": finite, "warnings": warned})
        return rows

    def to_html(self, path: str | Path | None = None) -> str:
        """One HTML page that needs no network, with pictures side by side where results are images; written to
        ``path`` if that is given."""
        from .report.comparison import render  # only here: who wants no page need not load the template engine

        page = render(self.rows, [_cells(row) for row in self.rows], self.pictures(), self.warnings)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def pictures(self) -> dict[str, list[Any]]:
        """Results that are images, by rows (Pillow's); empty where they are none, or Pillow is not installed."""
        return {name: found for name, result in self.results.items() if (found := as_pictures(result))}

    def __str__(self) -> str:
        columns = ("", "seconds", "speedup", "predicted", "FLOPs", "PSNR dB", "error", "kept", "compile s", "")
        return table(columns, [_cells(row) for row in self.rows])


def _cells(row: Compared) -> tuple[str, ...]:
    if row.failed is not None:
        return (row.name, *("-",) * 8, row.failed.splitlines()[0])
    uncached = row.config is None
    return (
        row.name,
        f"{row.seconds:.3g}",
        f"{row.speedup:.2f}x",
        f"{100 * row.predicted:.0f} %",
        "unknown" if row.flops is None else f"{100 * row.flops:.0f} %",
        "" if uncached else _decibels(row.psnr),
        "" if uncached else f"{row.error:.2g}",
        human_bytes(row.kept_bytes),
        f"{row.compile_seconds:.1f}",
        "*" if row.best else "",
    )


def _decibels(value: float | None) -> str:
    return "-" if value is None else "equal" if value == float("inf") else f"{value:.1f}"


@dataclass
class _Subject:
    """What samples: ``parts`` stand for the model, or for the denoisers of the pipeline."""

    name: str
    config: MethodConfig | None
    parts: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    result: Any = None
    summaries: list[Summary] = field(default_factory=list)
    failed: str | None = None


def compare(
    model: Any,
    sample: Callable[[Any], Any],
    caches: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    rounds: int = 2,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Run a sampling loop with each of some caches, and without.

    Args:
        model: A module that is not compiled, or a pipeline of diffusers.
        sample: The loop: called with what stands for ``model`` (for a pipeline: with it, its denoisers compiled), it
            returns a tensor, images, or what a pipeline returns. Its random numbers are the same each time.
        caches: Each as ``options["cache"]`` of ``torch.compile``: a config, a recipe, a name, a path of a JSON file.
        options: Further options of the backend, for all of them (Inductor's, for the uncached model too).
        rounds: Calls of the loop that count, after the first one, in which it is compiled.
        seed: Of the random numbers.
        progress: Show a progress bar.

    Returns:
        A comparison. A cache that cannot be used for this model has a row that says why.

    Raises:
        OptionError: No round, or the loop does not return the same for the same random numbers.
    """
    if rounds < 1:
        raise OptionError(f"{rounds} rounds", where="compare", hint="one round at least")
    denoisers = denoisers_of(model)
    modules = {"": model} if denoisers is None else denoisers
    given = dict(options or {})
    subjects = [_uncached(modules, given), *(_cached(modules, parse_cache(cache), given) for cache in caches)]
    _name_apart(subjects)
    calls = [subject for _ in range(1 + rounds) for subject in subjects]
    bar = Progress(disable=not progress, transient=True)
    with bar, shown_elsewhere(), _torch.many_captures(len(subjects)), torch.no_grad():
        task = bar.add_task("", total=len(calls))
        for subject in calls:
            bar.update(task, description=f"{subject.name}: {'sampling' if subject.seconds else 'compiling'}")
            if subject.failed is None:
                _call(subject, model, sample, seed)
            bar.advance(task)
    rows = [_figures(subject, subjects[0]) for subject in subjects]
    warned = {s.name: tuple(dict.fromkeys(w for found in s.summaries for w in found.warnings)) for s in subjects}
    results = {subject.name: subject.result for subject in subjects if subject.failed is None}
    return Comparison(tuple(_mark_best(rows)), results, {name: said for name, said in warned.items() if said})


def _uncached(modules: Mapping[str, Any], options: dict[str, Any]) -> _Subject:
    parsed = parse_options({key: value for key, value in options.items() if key != "lowering"})
    if options.get("lowering") == "eager":
        return _Subject(UNCACHED, None, dict(modules))
    compiled = {name: torch.compile(module, options=parsed.inductor or None) for name, module in modules.items()}
    return _Subject(UNCACHED, None, compiled)


def _cached(modules: Mapping[str, Any], config: MethodConfig, options: dict[str, Any]) -> _Subject:
    given = {**options, "cache": config}
    parts = {name: torch.compile(part, backend="cached_inductor", options=given) for name, part in modules.items()}
    return _Subject(config.label, config, parts)


def _name_apart(subjects: Sequence[_Subject]) -> None:
    """Equal configs have equal names: number them."""
    seen: dict[str, int] = {}
    for subject in subjects:
        seen[subject.name] = number = seen.get(subject.name, 0) + 1
        if number > 1:
            subject.name = f"{subject.name} #{number}"


def _call(subject: _Subject, model: Any, sample: Callable[[Any], Any], seed: int) -> None:
    """One call of the loop."""
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    try:
        with torch.random.fork_rng(), standing_in(model, subject.parts) as target:
            torch.manual_seed(seed)
            wait()
            start = time.perf_counter()
            result = sample(target)
            wait()
            subject.seconds.append(time.perf_counter() - start)
    except CachepassError as error:
        subject.failed = str(error)
        return
    if subject.config is not None:
        subject.summaries = [summary(part) for part in subject.parts.values()]
        for part in subject.parts.values():
            forget(part)  # what it keeps; the others need the memory, too
    elif subject.result is not None and relative_error(as_tensor(subject.result), as_tensor(result)) > _REPEATABLE:
        raise OptionError(
            "the sampling loop returns another result each time, so nothing can be compared with it",
            where="compare",
            hint="take all random numbers from torch's default generator, or from one that the loop makes and seeds",
        )
    subject.result = result


def _figures(subject: _Subject, uncached: _Subject) -> Compared:
    if subject.failed is not None:
        return Compared(subject.name, subject.config, failed=subject.failed)
    first, *later = subject.seconds
    found, expected = as_tensor(subject.result), as_tensor(uncached.result)
    if found.shape != expected.shape:
        what = f"its result has the shape {tuple(found.shape)}, and the uncached one {tuple(expected.shape)}"
        return Compared(subject.name, subject.config, failed=what)
    computed = sum(sum(s.computed.values()) for s in subject.summaries)
    predicted = sum(sum(s.predicted.values()) for s in subject.summaries)
    taken, plain = [s.flops for s in subject.summaries], [s.plain_flops for s in subject.summaries]
    flops = None if None in (*taken, *plain) else sum(taken) / max(sum(plain), 1)  # pyright: ignore
    return Compared(
        subject.name,
        subject.config,
        seconds=statistics.median(later),
        speedup=statistics.median(a / b for a, b in zip(uncached.seconds[1:], later, strict=True)),
        predicted=predicted / max(computed + predicted, 1),
        flops=1.0 if subject.config is None else flops,
        psnr=psnr(found, expected),
        error=relative_error(found, expected),
        kept_bytes=sum(s.held_bytes for s in subject.summaries),
        compile_seconds=max(0.0, first - statistics.median(later)),
    )


def _mark_best(rows: Sequence[Compared]) -> list[Compared]:
    """Mark the rows that no other is both faster and closer than."""

    def beaten(row: Compared) -> bool:
        return any(
            (other.seconds or 0.0) < (row.seconds or 0.0) and (other.error or 0.0) <= (row.error or 0.0)
            for other in rows
            if other.failed is None and other.config is not None
        )

    return [dataclasses.replace(r, best=r.failed is None and r.config is not None and not beaten(r)) for r in rows]
