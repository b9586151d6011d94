"""Plain-text tables through rich, as strings, so that reports print the same in a terminal, a notebook and a file."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None, width: int = 160) -> str:
    """A text table; columns whose cells are all numbers or end in digits are not aligned specially."""
    grid = Table(*columns, box=SIMPLE_HEAD, title=title, title_justify="left", title_style="", pad_edge=False)
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None, markup=False, highlight=False).print(grid)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).strip("\n") + "\n"


def human_bytes(count: int) -> str:
    """``1536`` -> ``"1.5 KiB"``."""
    return _human(count, 1024, ("B", "KiB", "MiB", "GiB"))


def human_flops(count: int | None) -> str:
    """``1500`` -> ``"1.5 kFLOP"``. None: where sizes depend on data."""
    return "unknown" if count is None else _human(count, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"))


def human_seconds(seconds: float) -> str:
    """``0.00123`` -> ``"1.23 ms"``; three digits."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _human(count: int, base: int, units: Sequence[str]) -> str:
    value = float(count)
    for unit in units[:-1]:
        if value < base:
            return f"{value:.0f} {unit}" if unit == units[0] else f"{value:.1f} {unit}"
        value /= base
    return f"{value:.1f} {units[-1]}"
