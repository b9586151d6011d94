"""HTML: a comparison as one page that needs no network, with pictures side by side where results are images."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from .page import environment, own

_SMALL = 96  # pixels: smaller pictures are enlarged, without smoothing


def render(
    rows: Sequence[Any],
    cells: Sequence[Sequence[str]],
    pictures: Mapping[str, Sequence[Any]],
    warnings: Mapping[str, Sequence[str]],
) -> str:
    """The page. ``rows`` are :class:`~cachepass.Compared`, ``cells`` their figures as text, ``pictures`` Pillow's."""
    template = environment().get_template("comparison.html")
    return template.render(
        style=own("page.css"),
        rows=list(zip(rows, cells, strict=True)),
        longest=max((row.seconds for row in rows if row.seconds is not None), default=1.0),
        pictures={name: [_data_url(image) for image in images] for name, images in pictures.items()},
        warnings=warnings,
        points=_points(rows),
    )


def _data_url(image: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    width, height = image.size
    times = max(1, -(-_SMALL // max(width, 1)))
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return {"url": f"data:image/png;base64,{encoded}", "width": width * times, "height": height * times}


def _points(every: Sequence[Any]) -> list[dict[str, Any]]:
    """Where the rows stand in the picture of error against time, in percent of its width and height."""
    rows = [row for row in every if row.failed is None and row.config is not None]
    if not rows:
        return []
    slowest = max(row.seconds or 0.0 for row in every)
    worst = max(row.error or 0.0 for row in rows) or 1.0
    return [
        {
            "name": row.name,
            "best": row.best,
            "x": 92 * (row.seconds or 0.0) / slowest,
            "y": 90 * (row.error or 0.0) / worst,
        }
        for row in rows
    ]
