"""No forecast at all: only what stays the same within a run is computed once."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import InvariantConfig
from .base import Method, Region, Selection, Step


class Invariant(Method):
    """Cuts nothing and predicts nothing."""

    cuts = False

    def __init__(self, config: InvariantConfig) -> None:
        self.config = config

    def select(self, regions: Sequence[Region], model: Sequence[str] | None = None) -> Selection:  # noqa: ARG002
        return Selection(())

    def predicts(self, group: str, step: Step) -> bool:  # noqa: ARG002
        return False

    def never_predicts(self, num_inference_steps: int | None) -> str | None:  # noqa: ARG002
        return None
