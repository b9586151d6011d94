"""What holds on CUDA by construction: no waits, no allocation of slots, pinned copies, CUDA graphs.

Programs are looked at as Inductor writes them for a GPU; the runtime with an eye on every operation outside of them.
"""

from __future__ import annotations

import pytest
import torch
from small_models import calls, transformer
from zoo import sweep_over

import cachepass
from cachepass.run.live import programs_of

pytest.importorskip("triton")

from offline_models import METHODS, explained, variants

from cachepass._torch import offline
from cachepass.gpu.program import compile_for, write_for
from cachepass.gpu.table import GPUS
from cachepass.program.specialize import Variant

# A program up to a decision copies two numbers to the host at its end; on the CPU, where it was captured, that is none.
WAITS = (".item()", ".tolist()", ".cpu()", "synchronize", "_local_scalar_dense", "nonzero", "empty_strided_cpu")
HOST = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal"}


def waits_of(code: str) -> list[str]:
    """What a program waits for."""
    lines = [line for line in code.splitlines() if not line.lstrip().startswith("#")]
    body = "\n".join(lines[lines.index(next(line for line in lines if "def call(" in line)) :])
    return [wait for wait in WAITS if wait in body]


@pytest.mark.parametrize("method", sweep_over(METHODS, ["taylorseer", "first_block"]))
def test_programs_wait_for_nothing_and_fit_into_cuda_graphs(method):
    gpu, made = GPUS["h100"], {}
    for variant, traced in variants(explained("DiTTransformer2DModel", method)):
        with offline.pretending(gpu.title, gpu.properties):
            made[variant.name] = write_for(variant, traced.inputs, traced.context, shares=True)
    for name, program in made.items():
        assert waits_of(program.written.code) == [], name
        assert program.no_graph is None, (name, program.no_graph)


@pytest.mark.parametrize("method", sweep_over(METHODS, ["first_block"]))
def test_two_rows_launch_as_many_kernels_as_one(method):
    """Pages are read in the kernels that forecast and written in those that compute; CUDA graphs can hold them."""
    if method == "fastercache":
        pytest.skip("guidance batches take no rows")
    explanation, gpu = explained("DiTTransformer2DModel", method), GPUS["h100"]
    program, codes = explanation.program, {}
    own = program.full.inputs
    differ = frozenset(i for i in range(len(own)) if i not in program.full.parameters and own[i].ndim)
    rows = program.for_rows(differ, 4)
    for variant, traced in variants(explanation):
        if variant.name == "once":
            continue
        one = compile_for(gpu, variant, own, traced.context, shares=True, machine_code=codes)
        graph = rows.graph(variant, traced, 2)
        for_two = Variant(f"{variant.name} x 2", graph.gm, (), repeated=variant.repeated)
        two = compile_for(gpu, for_two, graph.inputs, traced.context, shares=True, machine_code=codes)
        assert len(two.launches) <= len(one.launches), variant.name
        assert two.no_graph is None and waits_of(two.written.code) == [], variant.name


@pytest.mark.parametrize("method", ["taylorseer", "pab", "first_block"])
def test_a_step_does_nothing_beside_its_program(method):
    """In steps whose programs, slots and weights are there: no value is asked for, nothing is allocated or copied."""
    model = torch.compile(
        transformer(), backend="cached_inductor", fullgraph=True,
        options={"cache": METHODS[method], "lowering": "eager", "num_inference_steps": 12},
    )  # fmt: skip

    def watched(run):
        def inside(inputs):
            with torch.profiler.record_function("program"):
                return run(inputs)

        return inside

    def run_all():
        for x, t in given:
            model(x, t)

    given = calls(12)
    run_all()
    (dispatcher, _), *_ = programs_of(model)
    for lowered in dispatcher.program.variants.values():
        object.__setattr__(lowered, "run", watched(lowered.run))
    cachepass.reset(model)
    run_all()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run_all()
    events = profile.events()
    inside = [event.time_range for event in events if event.name == "program"]
    outside = [
        event.name
        for event in events
        if event.name.startswith("aten::")
        and event.time_range.start > inside[1].end  # a run begins by clearing what the last one left
        and not any(r.start <= event.time_range.start and event.time_range.end <= r.end for r in inside)
    ]
    assert len(inside) >= 12 and outside
    decisions = 12 if method == "first_block" else 0
    asked = [name for name in outside if name in HOST]
    assert len(asked) <= 12 + 2 * decisions, asked  # the timestep, which lies on the CPU, and what is decided by
    made = {name for name in outside if name.startswith(("aten::empty", "aten::zero", "aten::copy_", "aten::clone"))}
    assert not made, made


def test_weights_are_copied_from_pinned_memory(monkeypatch):
    done = []

    def to(self, device, *, non_blocking=False):
        done.append(("to", str(device), non_blocking))
        return self

    program = explained("DiTTransformer2DModel", "taylorseer").program
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: done.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", to)
    for _ in range(2):
        program.device_tensor("weights", (1.5, -0.5), torch.float32, torch.device("cuda"))
    assert done == ["pinned", ("to", "cuda", True)], "once for each set of values"
