"""Unseen writes: those that leave no trace on a tensor, where the library that makes them can be heard.

PEFT's hot swap writes an adapter's weights through ``.data``, so that a compiled model stays compiled, and no version
counter tells. Where PEFT is used, its function is wrapped: after a swap, what is kept for a run is computed anew.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
from typing import Any

_MODULE, _FUNCTION = "peft.utils.hotswap", "hotswap_adapter_from_state_dict"


class UnseenWrites:
    """Counts them, in the whole process.

    Attributes:
        count: Rises with each.
    """

    def __init__(self) -> None:
        self.count = 0
        self._listens = False
        self._next = itertools.count(1)

    def listen(self) -> int:
        """The count. Asked at every step: adapters, and PEFT with them, may come at any time."""
        if not self._listens and "peft" in sys.modules:
            self._listens = True
            self._wrap()
        return self.count

    def _wrap(self) -> None:
        try:
            module = importlib.import_module(_MODULE)  # now: who imports it for the first swap takes what is wrapped
            original: Any = getattr(module, _FUNCTION)
        except (ImportError, AttributeError):  # a PEFT that cannot swap
            return

        @functools.wraps(original)
        def announced(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            finally:  # also one that failed half-way
                self.count = next(self._next)

        setattr(module, _FUNCTION, announced)


UNSEEN = UnseenWrites()
