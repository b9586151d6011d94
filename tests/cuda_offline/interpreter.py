"""Run a model's GPU programs on the CPU, by Triton's interpreter inside Inductor's own wrapper; print the differences.

    TRITON_INTERPRET=1 python interpreter.py MODEL METHOD DTYPE [--break]

Prints JSON: for each program its launches and the largest relative difference of what it returns and writes from what
the graph gives that Inductor was given, run by eager torch; with ``--break`` also for the first one with the additions
of one kernel turned into subtractions. A process of its own, because Triton reads the variable when it is imported.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
assert os.environ.get("TRITON_INTERPRET") == "1", __doc__

import torch  # noqa: E402
from offline_models import explained, values_for, variants  # noqa: E402

from cachepass._torch import offline, playing  # noqa: E402
from cachepass._torch.machine_code import heuristics  # noqa: E402
from cachepass.gpu.program import write_for  # noqa: E402
from cachepass.gpu.table import GPUS  # noqa: E402

CPU = torch.device("cpu")
_LIBRARY = "import libdevice, math as tl_math"


class Interpreter:
    """A player that runs kernels by Triton's interpreter. ``broken``: the sums of one kernel are differences."""

    def __init__(self, broken: bool) -> None:
        self.launched, self._tuners, self._broken = 0, {}, broken

    def kernel(self, kernel, site, args):
        self.launched += 1
        if kernel.name not in self._tuners:
            source = kernel.source.replace(_LIBRARY, "import math as tl_math\nfrom interpreted_math import libdevice")
            if self._broken:
                source, count = re.subn(r"(tmp\d+ = tmp\d+) \+ (tmp\d+)", r"\1 - \2", source)
                self._broken = not count
            self._tuners[kernel.name] = heuristics(offline.Kernel(kernel.name, source))
        self._tuners[kernel.name].run(*args, stream=0)

    def operation(self, target, site, args, kwargs, run):
        if "convolution" in str(target):  # without cuDNN, Inductor takes its results for contiguous
            return run().contiguous()
        if "scaled_dot_product" not in str(target):
            return run()
        given = {argument.name: argument.default_value for argument in target._schema.arguments} | kwargs
        given |= dict(zip(given, args, strict=False))
        out = torch.nn.functional.scaled_dot_product_attention(
            given["query"], given["key"], given["value"], given.get("attn_bias"),
            is_causal=given["is_causal"], scale=given["scale"],
        )  # fmt: skip
        rest = [torch.empty(0) if str(r.type) == "Tensor" else 0 for r in target._schema.returns[1:]]  # nobody reads it
        return out.transpose(1, 2).contiguous().transpose(1, 2), *rest

    def allocated(self, value):
        value.fill_(torch.nan) if value.is_floating_point() else value.zero_()  # nobody may read what nobody wrote


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.double(), other.double()
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-6)) if one.numel() else 0.0


def compare(variant, traced, *, broken: bool) -> dict:
    gpu = GPUS["h100"]
    given = values_for(variant)
    expected_inputs = [value.clone() if isinstance(value, torch.Tensor) else value for value in given]
    with torch.no_grad():
        expected = variant.gm(*expected_inputs)
    player = Interpreter(broken)
    with offline.pretending(gpu.title, gpu.properties):
        made = write_for(variant, traced.inputs, traced.context, shares=True)
        read = made.ready.read or range(len(given))
        results = playing.play(made.written, [given[i] for i in read], player, CPU)
    for slot, value in zip(made.ready.adopting, results[len(expected) :], strict=True):
        given[slot] = value  # the slot takes it over
    results = results[: len(expected)]
    pairs = [*zip(results, expected, strict=True), *zip(given, expected_inputs, strict=True)]
    pairs = [pair for pair in pairs if isinstance(pair[1], torch.Tensor) and pair[1].is_floating_point()]
    return {"launched": player.launched, "difference": max(difference(*pair) for pair in pairs)}


def main(name: str, method: str, dtype: str, *flags: str) -> None:
    made = list(variants(explained(name, method, getattr(torch, dtype))))
    told = {v.name: compare(v, traced, broken=False) for v, traced in made}
    if "--break" in flags:
        told["broken"] = compare(*made[0], broken=True)
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
