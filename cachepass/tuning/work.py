"""Work: one call of ``tune``. The runs of the user's loop, and what they gave."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.progress import Progress

from .. import _torch
from ..config import TunedConfig
from ..config.tuned import Origin
from ..errors import CachepassError, CachepassWarning, OptionError, warn
from ..inspect.tables import human_bytes
from ..recipe.cut import Cut
from ..recipe.forecast import ForecastRule
from ..recipe.schedule import KeySteps
from ..run.live import denoiser_of, original_of
from .candidates import DEPTHS, FORECASTS, Candidate, fixed_methods, step_errors, table_of
from .cuts import Look, budgets_of, look_at
from .gram import recording_bytes
from .player import Played, Player, Recording, are_alike, decibels
from .schedules import step_lengths
from .search import Found, Scored, Search
from .tuning import Tuned, Tuning

_MOST_STEPS = 250
_FIXED_RUNS, _SEARCHED_RUNS = 45, 25  # of each budget, about


@dataclass(frozen=True)
class _Validated:
    """A budget's best, the FLOPs of its runs, and decibels in runs that nothing was tuned with: its own, and those of
    the best fixed method."""

    best: Scored
    share: float | None
    psnr: float | None
    fixed_psnr: float | None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


@dataclass
class Work:
    """One call of :func:`tune`: the runs of the user's loop, and what they gave."""

    model: Any
    sample: Callable[[Any, int], Any]
    count: int  # calibration runs; the name that a search knows
    validate: int
    options: dict[str, Any]
    forecasts: Sequence[ForecastRule] | None
    max_bytes: int | None
    tries: int
    num_inference_steps: int | None
    notes: list[str] = field(default_factory=list)
    found: dict[int, Found] = field(default_factory=dict)
    references: dict[int, Played] = field(default_factory=dict)
    bar: Progress = field(default_factory=Progress)
    task: Any = None
    player: Player | None = None
    recording: Recording | None = None
    validated: dict[int, _Validated] = field(default_factory=dict)

    # ---- recording ----------------------------------------------------------------------------------------------

    def record(self, cuts: Sequence[Cut]) -> None:
        """Choose the cut, and record the calibration runs with it."""
        look = self._choose(cuts)
        self.player, total = look.player, look.recording
        self.references[0] = look.reference
        for run in range(1, self.count):
            self._describe(f"recording an uncached run, {run + 1} of {self.count}")
            played = self.player.play((), run, record=True)
            assert played.recording is not None
            if len(played.recording.gram) != len(total.gram):
                raise OptionError(
                    f"a run has {len(played.recording.gram)} steps, and another {len(total.gram)}",
                    where="tune",
                    hint="let sample(model, run) make as many for every run",
                )
            total.gram += played.recording.gram
            self.references[run] = played
            self._check_different(run)
        self.recording = total
        self._check_length(len(total.gram))

    def _choose(self, cuts: Sequence[Cut]) -> Look:
        """The best of some cuts."""
        chosen: Look | None = None
        failed: CachepassError | None = None
        for cut in cuts:
            self._describe(f"looking at the cut: {cut}")
            player = Player(self.model, self.sample, cut, max(DEPTHS), self.options)
            try:
                with warnings.catch_warnings():
                    if cut is not cuts[0]:  # of the loop, which all of them have in common
                        warnings.simplefilter("ignore", CachepassWarning)
                    look = look_at(player, max(DEPTHS[:2]), chosen)
            except OptionError:
                raise
            except CachepassError as error:
                failed = error
                self.notes.append(f"the model has no cut {cut}: {str(error).splitlines()[0]}")
                continue
            slot = look.recording.slot_bytes
            if chosen is not None and self.max_bytes is not None and slot > self.max_bytes:
                self.notes.append(f"the cut {cut} would keep more than max_bytes: {human_bytes(slot)} an output")
            elif chosen is None or look.is_better_than(chosen):
                chosen = look
            player.close()  # its memory: the next cut needs it, too
        if chosen is None:
            assert failed is not None
            raise failed
        return chosen

    def _check_different(self, run: int) -> None:
        """Runs that are alike measure nothing but the first."""
        note = (
            "sample gives the same result for all runs, so the decibels of other runs are those of the calibration: "
            "choose the seed or the prompt by its second argument"
        )
        if note not in self.notes and are_alike(self.references[0].result, self.references[run].result):
            self.notes.append(note)
            warn(note)

    def _check_length(self, steps: int) -> None:
        if steps > _MOST_STEPS:
            raise OptionError(
                f"a run has {steps} steps, more than the {_MOST_STEPS} that can be searched",
                where="tune",
                hint="tune with a run of fewer steps: in longer ones the same timesteps are computed",
            )
        if self.num_inference_steps is not None and steps != self.num_inference_steps:
            raise OptionError(
                f"a run has {steps} steps, and num_inference_steps is {self.num_inference_steps}",
                where="tune",
                hint="give the number of calls that the loop makes of the model in each run, or leave it out",
            )

    # ---- searching ----------------------------------------------------------------------------------------------

    def plan(self, budgets: Sequence[int]) -> None:
        """Say what it will cost, before it does."""
        recording, player = self._recorded
        steps = len(recording.gram)
        budgets = budgets_of(budgets, steps)
        each = _FIXED_RUNS + _SEARCHED_RUNS + self.tries
        images = sum(each * count / steps for count in budgets) + self.validate * (1 + 2 * sum(budgets) / steps)
        self.bar.update(self.task, total=images if budgets else None, completed=0)
        kept = recording_bytes(recording.numbers, steps, recording.trajectories)
        if not self.bar.disable:
            cost = f"; about as long as {images:.0f} uncached runs" if budgets else ""
            told = f"{steps} steps, cut: {player.cut}; recording keeps {human_bytes(kept)}{cost}"
            self.bar.console.print(told, soft_wrap=True)

    def score(self, candidate: Candidate, run: int) -> float:
        """What a search asks: the decibels of one calibration run."""
        recording, player = self._recorded
        played = player.play(candidate.weights, run)
        self.bar.advance(self.task, len(candidate.computed) / len(recording.gram))
        return decibels(played.result, self.references[run].result)

    def search(self, count: int) -> None:
        """Find the best for a number of computed steps, and validate it."""
        self._describe(f"searching, {count} computed steps")
        found = self._searching.budget(count)
        if found.best is not None:
            self._validate(count, found)

    def reach(self, quality: float | Callable[[Any, Any], bool]) -> None:
        """Find the smallest number of computed steps that is good enough."""
        search = self._searching
        self._describe("looking for the smallest number of steps")
        count = search.up_to(lambda scored: self._is_good(scored, quality))
        while True:
            self.search(count)
            best = self.found[count].best
            assert best is not None
            good = self._is_good(best, quality) and self._stays_good(count, quality)
            below, above = self.found.get(count - 1), self.found.get(count + 1)
            if good and below is None and count > 1:
                count -= 1
            elif not good and above is None and count + 1 < len(self._recorded[0].gram):
                count += 1
            else:
                break
        reached = [c for c, f in self.found.items() if f.best and self._is_good(f.best, quality)]
        reached = [c for c in reached if self._stays_good(c, quality)]
        if not reached:
            self.notes.append("no number of computed steps reaches that quality; the best that was found")
        chosen = min(reached) if reached else max(self.found)
        for other in [c for c in self.found if c != chosen]:
            del self.found[other]

    def _is_good(self, scored: Scored, quality: float | Callable[[Any, Any], bool]) -> bool:
        if not callable(quality):
            return scored.mean >= quality
        _, player = self._recorded
        played = [player.play(scored.candidate.weights, run) for run in range(self.count)]
        return all(quality(p.returned, self.references[run].returned) for run, p in enumerate(played))

    def _stays_good(self, count: int, quality: float | Callable[[Any, Any], bool]) -> bool:
        """Also in the runs that it was not tuned with."""
        known = self.validated.get(count)
        return callable(quality) or known is None or known.psnr is None or known.psnr >= quality

    def _validate(self, count: int, found: Found) -> None:
        """Runs that nothing was tuned with; the programs' FLOPs on the way."""
        recording, player = self._recorded
        self._describe(f"validating, {count} computed steps")
        values: dict[str, list[float]] = {"best": [], "fixed": []}
        share = None
        for run in range(self.count, self.count + self.validate):
            if run not in self.references:
                self.references[run] = player.play((), run)
                self._check_different(run)
                self.bar.advance(self.task)
            for name, scored in (("fixed", found.fixed), ("best", found.best)):
                if scored is not None:
                    played = player.play(scored.candidate.weights, run)
                    share = played.share
                    values[name].append(decibels(played.result, self.references[run].result))
                    self.bar.advance(self.task, len(scored.candidate.computed) / len(recording.gram))
        best = found.best
        assert best is not None
        if share is None:
            share = player.play(best.candidate.weights, 0).share
        self.validated[count] = _Validated(best, share, *(_mean(values[name]) for name in ("best", "fixed")))

    # ---- what was found -----------------------------------------------------------------------------------------

    def tuning(self) -> Tuning:
        """What was found so far, as a value; what the model was captured for is dropped."""
        recording, player = self._recorded
        module: Any = original_of(denoiser_of(self.model))
        told, digest = player.slate.parts
        name = type(module).__name__
        points = []
        for count, found in sorted(self.found.items()):
            if found.best is None:
                continue
            known = self.validated.get(count) or _Validated(found.best, None, None, None)
            points.append(self._point(found, known, Origin(name, told, digest, known.psnr)))
        player.close()
        _torch.drop_captures(module)
        return Tuning(name, len(recording.gram), tuple(points), tuple(self.notes))

    def _point(self, found: Found, known: _Validated, origin: Origin) -> Tuned:
        recording, player = self._recorded
        best = known.best
        candidate = best.candidate
        forecast = candidate.forecast or table_of(candidate, recording.timesteps)
        config = TunedConfig(
            cut=player.cut,
            schedule=KeySteps(candidate.computed, recording.timesteps),
            forecast=forecast,
            origin=origin,
        )
        fixed = found.fixed
        return Tuned(
            len(candidate.computed),
            known.share,
            known.psnr,
            best.mean,
            None if fixed is None else (fixed.candidate.name, fixed.mean, known.fixed_psnr),
            recording.slot_bytes * candidate.depth,
            step_errors(recording.gram, candidate),
            candidate.name,
            config,
        )

    @property
    def _recorded(self) -> tuple[Recording, Player]:
        assert self.recording is not None and self.player is not None
        return self.recording, self.player

    @property
    def _searching(self) -> Search:
        recording, _ = self._recorded
        scale = step_lengths(recording.timesteps)
        return Search(recording.gram, scale, self, self.tries, self._depths(recording), self._fixed, self.found)

    def _fixed(self, count: int, steps: int) -> Iterator[Candidate]:
        recording, _ = self._recorded
        allowed = self._depths(recording)[-1]
        rules = FORECASTS if self.forecasts is None else self.forecasts
        return (c for c in fixed_methods(count, steps, rules) if c.depth <= max(allowed, 1))

    def _depths(self, recording: Recording) -> list[int]:
        """How many outputs may be kept."""
        if self.max_bytes is None or not recording.slot_bytes:
            return list(DEPTHS)
        most = self.max_bytes // recording.slot_bytes
        if most < 1:
            raise OptionError(
                f"one output takes {human_bytes(recording.slot_bytes)}, and {human_bytes(self.max_bytes)} are allowed",
                where="tune.max_bytes",
                hint="give more, or cut=Blocks(), which keeps one value for all blocks",
            )
        return [depth for depth in (1, *DEPTHS) if depth <= most][-len(DEPTHS) :]

    def _describe(self, what: str) -> None:
        self.bar.update(self.task, description=what)
