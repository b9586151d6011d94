"""What the graph knows of a forecast: how many outputs are kept, and which weights never change."""

from __future__ import annotations

from dataclasses import dataclass

from ..value import Value


@dataclass(frozen=True)
class Forecast(Value):
    """What stands in for a cut's value on a predicted step.

    Attributes:
        name: For people: ``"reuse"``, ``"zeros"``, ``"taylor(1)"``.
        history: Number of outputs kept per cut.
        constant_weights: The weights, newest output first, where they never change; None: given at each step.
        recursive: A prediction becomes the newest entry of the history, as a computed output does.
        per_region: The weights may differ from region to region of a group.
        from_gram: The weights depend on the outputs kept, through their inner products.
    """

    name: str
    history: int
    constant_weights: tuple[float, ...] | None = None
    recursive: bool = False
    per_region: bool = False
    from_gram: bool = False

    def __str__(self) -> str:
        return self.name


REUSE = Forecast("reuse", history=1, constant_weights=(1.0,))
ZEROS = Forecast("zeros", history=0, constant_weights=())


def taylor(order: int) -> Forecast:
    """TaylorSeer's forecast of the given order; weights from ``taylor_weights``."""
    return Forecast(f"taylor({order})", history=order + 1)
