"""The CUDA path without a GPU: machine code of all programs, their kernels run by Triton's interpreter, what by
construction holds on CUDA.

Needs ``triton``. Every method and every model is compiled, and two cases are interpreted; with ``CACHEPASS_ZOO=1``
all of them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from offline_models import METHODS, MODELS, explained, variants
from zoo import ALL, sweep_over

import cachepass

pytest.importorskip("triton")

from cachepass._torch.machine_code import MachineCode
from cachepass.gpu.program import GpuProgram, compile_for
from cachepass.gpu.table import GPUS

HERE = Path(__file__).parent
EVERY = [(model, method) for model in MODELS for method in METHODS]
CASES = sweep_over(
    EVERY,
    [
        ("FluxTransformer2DModel", "taylorseer"),
        ("WanTransformer3DModel", "pab"),
        ("DiTTransformer2DModel", "fastercache"),
        ("DiTTransformer2DModel", "first_block"),
        ("DiTTransformer2DModel", "dbcache"),
    ],
)
GOLDEN = json.loads((HERE / "launches.json").read_text())
# What two ways to round differ by, over a model's depth: eager torch rounds after every operation, a kernel once.
ROUNDING = {"bfloat16": 0.1, "float32": 1e-3}
IN_FP32 = {("FluxTransformer2DModel", "fastercache")}  # in bf16, rounding alone makes its output another one


def programs(explanation: cachepass.Explanation, gpu: str, codes: dict[str, MachineCode]) -> dict[str, GpuProgram]:
    return {
        variant.name: compile_for(
            GPUS[gpu], variant, traced.inputs, traced.context,
            shares=True, machine_code=codes,
        )
        for variant, traced in variants(explanation)
    }  # fmt: skip


# ---- machine code and counts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "method"), CASES)
def test_every_program_compiles(name, method):
    """For sm_90, some for sm_80 too, without spills; launches are those of the table, so that a lost fusion shows."""
    explanation = explained(name, method)
    for gpu in ("a100", "h100") if ALL or method in ("pab", "first_block") else ("h100",):
        codes: dict[str, MachineCode] = {}
        made = programs(explanation, gpu, codes)
        assert codes and all(code.cubin[:4] == b"\x7fELF" for code in codes.values())
        stacks = {source: code.stack for source, code in codes.items() if code.stack}
        assert all(stack <= 48 and re.search(r"\b(sin|cos)\(", source) for source, stack in stacks.items()), stacks
        assert all(program.launches for program in made.values())
    counted = {p: [len(made[p].launches), sum(launch.fused for launch in made[p].launches)] for p in made}
    if os.environ.get("CACHEPASS_ACCEPT"):
        GOLDEN.update(json.loads((HERE / "launches.json").read_text()))  # another process may have written its own
        GOLDEN.setdefault(name, {})[method] = counted
        (HERE / "launches.json").write_text(json.dumps(GOLDEN, indent=1, sort_keys=True) + "\n")
    if torch.__version__.startswith("2.13."):  # others fuse otherwise
        assert counted == GOLDEN[name][method]


# ---- what kernels compute --------------------------------------------------------------------------------------------


def interpreted(name: str, method: str, dtype: str, *flags: str) -> dict[str, dict[str, float]]:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(
        [sys.executable, str(HERE / "interpreter.py"), name, method, dtype, *flags],
        env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "method"),
    sweep_over(EVERY, [("DiTTransformer2DModel", "taylorseer"), ("DiTTransformer2DModel", "first_block")]),
)
def test_kernels_give_what_eager_gives(name, method):
    """A kernel that is broken on purpose does not."""
    dtype = "float32" if (name, method) in IN_FP32 else "bfloat16"
    told = interpreted(name, method, dtype, "--break")
    broken = told.pop("broken")
    assert len(told) > 1 and sum(program["launched"] for program in told.values()) > 10
    assert {p: round(t["difference"], 4) for p, t in told.items() if not t["difference"] <= ROUNDING[dtype]} == {}
    assert not broken["difference"] <= ROUNDING[dtype]
