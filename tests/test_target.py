"""A model on a GPU that is not there: what is counted, what is estimated, and that nothing of it stays behind."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from small_models import calls, transformer
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import cachepass
from cachepass import OptionError, _torch
from cachepass.cli import main
from cachepass.gpu.table import GPUS, gpu_of

pytest.importorskip("triton")

from cachepass._torch.offline import pretending
from cachepass.gpu.program import Launch
from cachepass.gpu.retarget import retarget
from cachepass.inspect.target import run_seconds
from cachepass.program.specialize import Variant

CACHE = {"method": "taylorseer", "cache_interval": 3, "max_order": 1, "cache_identifiers": ["attention"]}
H100 = GPUS["h100"]


def explained(**options):
    x, t = calls(1)[0]
    with torch.no_grad():
        return cachepass.explain(transformer(), x, t, cache=CACHE, target="h100", options=options)


@pytest.fixture(scope="module")
def explanation():
    torch._dynamo.reset()
    return explained(num_inference_steps=12)


def test_every_phase_has_its_launches(explanation):
    target = explanation.target
    assert target.gpu is H100 and set(target.calls) == {"compute", "predict"}
    assert target.launches("plain") >= target.launches("compute") - 2 > target.launches("predict") > 0
    assert target.flops("predict") < target.flops("plain") == explanation.flops("plain") + explanation.flops("once")
    for phase in ("plain", "compute", "predict"):
        kernels = target.kernels(phase)
        assert sum(row.count for row in kernels) == target.launches(phase)
        assert [row.seconds for row in kernels] == sorted((row.seconds for row in kernels), reverse=True)
        fused = [row for row in kernels if row.launch.fused]
        assert fused and all(row.code.registers > 0 and row.code.cubin for row in fused)
    assert any("attn" in row.launch.module for row in target.kernels("compute"))
    assert not any(".attn" in row.launch.module for row in target.kernels("predict"))


def test_a_run_is_the_sum_of_its_steps(explanation):
    target = explanation.target
    run = run_seconds(explanation, explanation._calls(12, None, None))
    (lane,) = explanation.timeline(12)
    steps = lane.computed * target.seconds("compute") + lane.predicted * target.seconds("predict")
    once = target.seconds("once") if "once" in target.programs else 0.0
    assert run.cached == run.least == pytest.approx(steps + once)
    assert run.plain == pytest.approx(12 * target.seconds("plain")) and run.speedup[0] > 1


def test_it_is_told_in_words_as_values_and_on_the_page(explanation):
    text, told, page = str(explanation), explanation.as_dict()["target"], explanation.to_html()
    for said in (text, page):
        assert "NVIDIA H100" in said and "n estimate, not a measurement" in said
    assert told["phases"]["predict"]["launches"] == explanation.target.launches("predict")
    assert told["phases"]["compute"]["cuda_graph"] and told["run"]["seconds"] < told["run"]["plain_seconds"]
    assert 'id="gpu"' in page and explanation.target.kernels("predict")[0].launch.name in page


def test_without_a_target_nothing_is_said_of_a_gpu():
    x, t = calls(1)[0]
    plain = cachepass.explain(transformer(), x, t, cache=CACHE)
    assert plain.target is None and "target" not in plain.as_dict() and 'id="gpu"' not in plain.to_html()


def test_nothing_stays_behind(explanation):
    assert explanation.target is not None
    assert not torch.cuda.is_available() or torch.cuda.get_device_name() != H100.title
    compiled = torch.compile(lambda x: x.sin() + 1)
    x = torch.randn(8)
    assert torch.allclose(compiled(x), x.sin() + 1)


def test_the_roofline():
    half = torch.bfloat16
    assert Launch("copy", "", 3_350_000, 0).seconds(H100) == pytest.approx(1e-6)
    assert Launch("mm", "", 8, 8, flops=989_400_000, dtype=half).seconds(H100) == pytest.approx(1e-6)
    assert H100.peak(torch.float32) == pytest.approx(66.9e12)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert H100.peak(torch.float32) == pytest.approx(494.7e12)
    finally:
        torch.set_float32_matmul_precision(before)


class Sum(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cut = torch.nn.Linear(64, 64, bias=False)

    def forward(self, x, timestep):
        return (self.cut(x) * timestep).relu()


def test_bytes_and_flops_are_those_of_the_tensors():
    found = cachepass.explain(
        Sum().eval(), torch.randn(32, 64), torch.ones(1),
        cache={**CACHE, "cache_identifiers": ["cut"], "taylor_factors_dtype": torch.float32}, target="a100",
    )  # fmt: skip
    target = found.target
    product, pointwise = target.plain.launches
    assert (product.flops, product.bytes_read, product.bytes_written) == (2 * 32 * 64 * 64, 4 * (2048 + 4096), 8192)
    assert (pointwise.bytes_read, pointwise.bytes_written) == (8192 + 4, 8192)
    (predicted,) = target.programs["predict"].launches
    assert (predicted.bytes_read, predicted.bytes_written) == (2 * 8192 + 4 + 8, 8192), "two slots, timestep, weights"
    assert len(target.programs["compute"].launches) == 2, "what is kept is not copied"
    assert target.weight_bytes == 64 * 64 * 4 and found.cache_bytes == 2 * 8192


def test_new_values_begin_where_their_memory_does():
    """At its first call ``aten.copy`` of a view gives a fake value that does not, and blocks would differ by it."""
    given = torch.randn(4, 8), torch.randn(4, 4)
    gm = make_fx(lambda x, y: torch.ops.aten.copy.default(x[:, 1::2], y), tracing_mode="fake")(*given)
    inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    FakeTensorMode.cache_clear()
    with pretending(H100.title, H100.properties):
        moved, _, _ = retarget(Variant("x", gm, ()), inputs, _torch.save_context(inputs, {}, {}))
    (copy,) = moved.gm.graph.find_nodes(op="call_function", target=torch.ops.aten.copy.default)
    assert copy.args[0].meta["val"].storage_offset() == 1 and copy.meta["val"].storage_offset() == 0


def test_a_model_without_memory():
    with torch.device("meta"):
        model = transformer()
    x = calls(1)[0][0]
    found = cachepass.explain(model, x.to("meta"), torch.tensor([0.5, 0.5]), cache=CACHE, target="l40s")
    assert found.target.seconds("plain") > 0
    assert all(parameter.is_meta for parameter in model.parameters()), "the model is left as it is"


def test_targets_that_are_not_there(monkeypatch):
    x, t = calls(1)[0]
    with pytest.raises(OptionError, match="did you mean 'h100'"):
        cachepass.explain(transformer(), x, t, cache=CACHE, target="h10")
    monkeypatch.setattr(_torch, "has_triton", lambda: False)
    with pytest.raises(OptionError, match=r"cachepass\[target\]"):
        cachepass.explain(transformer(), x, t, cache=CACHE, target="h100")


def test_gpus_are_known_by_name():
    assert gpu_of("RTX 4090") is GPUS["rtx4090"] and gpu_of(H100) is H100
    for gpu in GPUS.values():
        assert gpu.source and gpu.peak(torch.bfloat16) > gpu.peak(torch.float32)


def test_the_command_line_has_it(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(
        "import torch\n\n\nclass Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.attn = torch.nn.Linear(8, 8)\n\n    def forward(self, x, timestep):\n"
        "        return self.attn(x).relu() * timestep\n\n\n"
        "def make():\n    return Net().eval(), {'x': torch.randn(2, 8), 'timestep': torch.ones(1)}\n"
    )
    cache = '{"method": "taylorseer", "cache_identifiers": ["attn"]}'
    result = CliRunner().invoke(main, ["explain", f"{path}:make", "--cache", cache, "--target", "b200"])
    assert result.exit_code == 0, result.output
    assert "NVIDIA B200" in result.output and "a run of 28 steps" in result.output
    wrong = CliRunner().invoke(main, ["explain", f"{path}:make", "--cache", cache, "--target", "z80"])
    assert wrong.exit_code == 1 and "there is no GPU 'z80'" in wrong.output
