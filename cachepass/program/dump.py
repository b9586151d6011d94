"""Dump: the graph after each pass, for tlparse (``TORCH_TRACE=dir``) and as files (``CACHEPASS_DUMP=dir``).

    000_dynamo.txt  001_annotated.txt  002_aten.txt  003_once.txt  004_canonical.txt  005_compute.txt ...

Numbers go on where the folder's files end, so nothing that was there is written over.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from torch import fx

from .. import _torch
from ..errors import OptionError
from .show import readable

_lock = threading.Lock()


def dump(name: str, graph: fx.Graph, names: dict[str, str] | None = None) -> None:
    """Give a graph to whoever listens; free when nobody does.

    Raises:
        OptionError: ``CACHEPASS_DUMP`` is not a folder that can be written.
    """
    _torch.trace_artifact(name, lambda: readable(graph, names))
    folder = os.environ.get("CACHEPASS_DUMP")
    if not folder:
        return
    with _lock:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            number = 1 + max((int(path.name[:3]) for path in Path(folder).glob("[0-9][0-9][0-9]_*.txt")), default=-1)
            (Path(folder) / f"{number:03d}_{name.replace('/', '-')}.txt").write_text(readable(graph, names))
        except OSError as error:
            raise OptionError(
                f"cannot be written: {error}", where="CACHEPASS_DUMP", hint="give a folder, or unset it"
            ) from None
