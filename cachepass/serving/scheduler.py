"""StepScheduler: requests come and go, an engine asks which rows to call next.

    submit(Request)       any thread       waiting -> active, when one of ``max_active`` places is free
    next() -> Call        the engine       active -> in a call
    done(Call)            the engine       the next step, or over
    failed(Call)          the engine       the same step again
    cancel(name)          any thread       over

**No request starves, whatever the policy.** Places are given in the order of submission. A row that ``patience`` calls
have passed over is *due*: the one due longest is in the next call, and of those due as many of its size as fit. Nobody
overtakes it, since a row that has run begins to count anew. So at most ``patience + max_active - 1`` calls pass over a
row and, where all requests have the same size, ``patience + ceil(max_active / max_rows) - 1``.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from ..errors import ConcurrencyError, OptionError
from .policies import CatchUp, Policy
from .requests import Call, Request, Row


@dataclass(eq=False)
class _Active:
    """A request that has a place: its next row, and the call that this row is in."""

    request: Request
    row: Row
    call: Call | None = None
    cancelled: bool = False


class StepScheduler:
    """Which rows to call next, so that steps that do the same run together; no tensor and no model.

    Args:
        max_rows: Rows that a call can have.
        max_active: Requests that hold state at the same time: the capacity of the model's pool. Others wait, in the
            order of submission.
        policy: Picks rows. None: :class:`CatchUp` with typical costs.
        patience: Calls that may pass over a request before it is due. None: any number, and no promise.

    All methods may be called by any thread. An engine is a loop::

        while call := scheduler.next(timeout=None):
            for name in call.over:
                cachepass.release(name)
            try:
                step(call.rows)
            except Exception:
                scheduler.failed(call)  # and cancel those that failed too often
            else:
                scheduler.done(call)

    Raises:
        OptionError: A number is less than 1.
    """

    def __init__(
        self,
        *,
        max_rows: int = 8,
        max_active: int = 8,
        policy: Policy | None = None,
        patience: int | None = 8,
    ) -> None:
        for name, value in {"max_rows": max_rows, "max_active": max_active, "patience": patience}.items():
            if value is not None and (not isinstance(value, int) or value < 1):
                raise OptionError(
                    f"expected an int >= 1, got {value!r}", where=f"StepScheduler({name})", hint="give one such as 8"
                )
        self.max_rows, self.max_active, self.patience = max_rows, max_active, patience
        self.policy = CatchUp() if policy is None else policy
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self._active: dict[str, _Active] = {}
        self._over: list[str] = []  # no longer active, and holding state until the engine hears of it
        self._admitted, self._closed = 0, False
        self._changed = threading.Condition()

    # ---- any thread -----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Let a request wait for a place.

        Raises:
            ConcurrencyError: A request of this name is not over yet, or the scheduler is closed.
            OptionError: The policy cannot serve it.
        """
        self.policy.check(request)
        with self._changed:
            if self._closed:
                raise ConcurrencyError(
                    "the scheduler is closed and takes no more requests",
                    where=f"request {request.name!r}",
                    hint="submit it to another engine",
                )
            if request.name in self._waiting or request.name in self._active or request.name in self._over:
                raise ConcurrencyError(
                    "a request of this name is not over yet",
                    where=f"request {request.name!r}",
                    hint="give each request a name of its own",
                )
            self._waiting[request.name] = request
            self._changed.notify_all()

    def cancel(self, name: str) -> bool:
        """Forget a request, also one that is in a call: what the call gives for it is nobody's. False: there is none of
        this name, or it is over."""
        with self._changed:
            if self._waiting.pop(name, None) is not None:
                return True
            active = self._active.get(name)
            if active is None or active.cancelled:
                return False
            active.cancelled = True
            if active.call is None:
                self._end(name)
            return True

    def close(self) -> None:
        """Cancel everything and take nothing more. ``next`` tells the engine what to free, then that there is
        nothing to do."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            for name in list(self._active):
                self.cancel(name)
            self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """Requests without a place."""
        with self._changed:
            return len(self._waiting)

    @property
    def active(self) -> int:
        """Requests that hold state, those included that are over and not freed yet."""
        with self._changed:
            return len(self._active) + len(self._over)

    # ---- the engine -----------------------------------------------------------------------------------------------

    def next(self, timeout: float | None = 0.0) -> Call:
        """What to do next: an empty (false) call, if there is nothing.

        Args:
            timeout: Seconds to wait for something to do; None: until there is, or the scheduler is closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._something(), timeout)
            over, self._over = tuple(self._over), []
            self._admit()
            rows = self._pick()
            call = Call(rows, over)
            for row in rows:
                self._active[row.name].call = call
            for active in self._active.values():
                if rows and active.call is None:
                    active.row = replace(active.row, passed=active.row.passed + 1)
            return call

    def done(self, call: Call) -> None:
        """The call's rows have made their steps.

        Raises:
            ConcurrencyError: The call was not handed out by this scheduler, or it is over.
        """
        with self._changed:
            made = self._rows_of(call)
            goes_on = [active for active in made if not active.cancelled and not active.row.last]
            # A request's function of the step may raise: it is asked before anything changes.
            following = [self._row(active.request, active.row.step + 1, active.row.arrival) for active in goes_on]
            for active, row in zip(goes_on, following, strict=True):
                active.row = row
            self._take_back(made, goes_on)

    def failed(self, call: Call) -> None:
        """The call raised: its rows are ready for the same steps again. The scheduler repeats a step without end;
        ``Row.attempt`` says how often it failed, and whoever has had enough cancels.

        Raises:
            ConcurrencyError: The call was not handed out by this scheduler, or it is over.
        """
        with self._changed:
            made = self._rows_of(call)
            again = [active for active in made if not active.cancelled]
            for active in again:
                active.row = replace(active.row, passed=0, attempt=active.row.attempt + 1)
            self._take_back(made, again)

    # ---- under the lock -------------------------------------------------------------------------------------------

    def _something(self) -> bool:
        free = self._waiting and len(self._active) < self.max_active
        return bool(self._over or free or any(active.call is None for active in self._active.values()))

    def _admit(self) -> None:
        """Free places go to those that waited longest."""
        while self._waiting and len(self._active) < self.max_active:
            name, request = self._waiting.popitem(last=False)
            self._active[name] = _Active(request, self._row(request, 0, self._admitted))
            self._admitted += 1

    def _row(self, request: Request, step: int, arrival: int) -> Row:
        return Row(request, step, request.phase(step), arrival)

    def _pick(self) -> tuple[Row, ...]:
        ready = [active.row for active in self._active.values() if active.call is None]
        if not ready:
            return ()
        late = [row for row in ready if self.patience is not None and row.passed >= self.patience]
        late.sort(key=lambda row: (-row.passed, row.arrival))
        due = late[0] if late else None
        if due is not None:
            ready = [row for row in ready if row.size == due.size]
            late = [row for row in late if row.size == due.size]
        picked = self.policy.pick(ready, self.max_rows, due)
        self._check(picked, ready)
        return tuple({row.name: row for row in (*late, *picked)}.values())[: self.max_rows]

    def _check(self, picked: Sequence[Row], ready: Sequence[Row]) -> None:
        """A policy that picks nothing would stop the engine, and rows of different sizes cannot share a call."""
        sizes: set[Hashable] = {row.size for row in picked}
        given = {row.name for row in ready}
        if len(sizes) != 1 or len(picked) > self.max_rows or not all(row.name in given for row in picked):
            raise OptionError(
                f"it picked {len(picked)} rows of {len(sizes)} sizes, of {len(ready)} that are ready",
                where=f"policy {type(self.policy).__name__}",
                hint=f"pick 1 to {self.max_rows} of the rows given, of one size",
            )

    def _rows_of(self, call: Call) -> list[_Active]:
        found = [self._active.get(name) for name in call.names]
        made = [active for active in found if active is not None and active.call is call]
        if len(made) != len(call.rows):
            raise ConcurrencyError(
                "this call is over, or it was not handed out by this scheduler",
                where="StepScheduler",
                hint="report each call of next() once, by done or by failed",
            )
        return made

    def _take_back(self, made: Sequence[_Active], goes_on: Sequence[_Active]) -> None:
        """The call is over: those that go on are ready again, the others are over."""
        for active in made:
            active.call = None
            if active not in goes_on:
                self._end(active.row.name)
        self._changed.notify_all()

    def _end(self, name: str) -> None:
        del self._active[name]
        self._over.append(name)
        self._changed.notify_all()
