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
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def human_flops(count: int) -> str:
    """``1536`` -> ``"1.5 kFLOP"``."""
    value = float(count)
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000 or unit == "T":
            return f"{value:.0f} FLOP" if not unit else f"{value:.1f} {unit}FLOP"
        value /= 1000
    raise AssertionError
