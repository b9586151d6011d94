"""Archives run like what was compiled, without the model's code; what does not fit is said, nothing is half loaded."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from archives import exported_once
from click.testing import CliRunner
from expecttest import TestCase
from small_models import Transformer, calls, transformer
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from zoo import ALL, ZOO, build, first_tensor, inputs_of, is_one_graph, relative_error, sweep_over, trajectory

import cachepass
from cachepass import LoadedModel, _torch
from cachepass.capture.nodes import returned_by
from cachepass.cli import main
from cachepass.options import parse_options
from cachepass.program.share import share
from cachepass.recipe.value import from_dict, to_dict
from cachepass.ship.export import _Archive, _dense
from cachepass.ship.listing import Call, Copy, Listing, View
from cachepass.ship.load import Archive
from cachepass.ship.loaded import LoadedProgram, dispatcher_of
from cachepass.ship.manifest import Form, Stored
from cachepass.ship.pieces import Pieces, _lie_alike, cut_up

HERE = Path(__file__).parent
TAYLOR = {"method": "taylorseer", "cache_interval": 3, "disable_cache_before_step": 2, "max_order": 1}
QUICK = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # what runs is the same, and compiled sooner

# ---- every method, in a process that has neither the model's code nor a compiler -------------------------------------

METHODS: dict[str, dict[str, Any]] = {
    "taylorseer": TAYLOR,
    "pab": {
        "method": "pab", "spatial_attention_block_skip_range": 2, "cross_attention_block_skip_range": 3,
        "spatial_attention_timestep_skip_range": (-1, 1001), "cross_attention_timestep_skip_range": (-1, 1001),
    },
    "first_block_cache": {"method": "first_block_cache"},
    "fastercache, a batch": {"method": "fastercache"},
    "fastercache, two calls": {"method": "fastercache"},
}  # fmt: skip
FASTER = {"unconditional_batch_skip_range": 3, "unconditional_batch_timestep_skip_range": (-1, 900),
          "spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (-1, 950)}  # fmt: skip
FORMATS = {"DiTTransformer2DModel": "BCHW", "WanTransformer3DModel": "BCFHW"}
MODELS = ["DiTTransformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel"]
CASES = [(m, k) for m in MODELS for k in METHODS if m in FORMATS or "fastercache" not in k]


@pytest.mark.parametrize(
    ("name", "kind"),
    sweep_over(
        CASES,
        [
            ("DiTTransformer2DModel", "first_block_cache"),
            ("DiTTransformer2DModel", "fastercache, two calls"),
            ("DiTTransformer2DModel", "fastercache, a batch"),
        ],
    ),
)
@pytest.mark.inductor
@pytest.mark.filterwarnings("ignore:all of 9 steps:cachepass.CachepassWarning")
def test_archives_equal_what_is_compiled(name, kind, tmp_path):
    """Two runs of nine steps, decisions included."""
    config = dict(METHODS[kind])
    if kind == "first_block_cache":
        config |= {"threshold": 0.07 if name == "WanTransformer3DModel" else 0.3}
    if "fastercache" in kind:
        config |= {**FASTER, "tensor_format": FORMATS[name]}
    if kind == "pab" and name != "WanTransformer3DModel":
        config = {key: value for key, value in config.items() if "cross" not in key}
    runs = [_run(name, kind, seed) for seed in (1, 2)]
    model = build(name, layers=2)
    path, weights = tmp_path / "model.cpz", tmp_path / "weights.safetensors"
    from safetensors.torch import save_file

    save_file({k: v.clone() for k, v in model.state_dict().items()}, weights)
    options = {"num_inference_steps": 9, **QUICK}
    context, example = runs[0][0]
    with cachepass.cache_context(context) if context else contextlib.nullcontext():
        cachepass.export(model, **example, cache=config, path=path, options=options)
    (results, marks, counts), heavy = _elsewhere([(path, str(weights), runs)], tmp_path)
    assert not heavy
    lowering, bound = ("specialize", 1e-6) if ALL else ("eager", 1e-5)
    options = {"cache": config, "num_inference_steps": 9, "lowering": lowering}
    compiled = torch.compile(model, backend="cached_inductor", fullgraph=True, options=options)
    expected = [_first(compiled, context, kwargs) for run in runs for context, kwargs in run]
    assert max(map(relative_error, results, expected)) <= bound
    summary = cachepass.summary(compiled)
    assert (marks, counts) == (summary.last_runs, summary.by_context)
    assert any("." in line for groups in marks.values() for line in groups.values())


def _run(name: str, kind: str, seed: int) -> list[tuple[str | None, dict[str, Any]]]:
    """The calls of a run, each with its context."""
    latents = "x" if "x" in inputs_of(name) else "hidden_states"
    steps = [one for _, one in trajectory(name, 9, guided=kind == "fastercache, a batch")]
    steps = [{**one, latents: one[latents] * (1 + 0.2 * seed)} for one in steps]
    if kind == "fastercache, two calls":
        return [(context, one) for one in steps for context in ("cond", "uncond")]
    return [(None, one) for one in steps]


def _first(model: Any, context: str | None, kwargs: dict[str, Any]) -> torch.Tensor:
    with cachepass.cache_context(context) if context else contextlib.nullcontext():
        return model(**kwargs)[0].clone()


def _elsewhere(cases: list[tuple[Path, Any, Any]], folder: Path) -> tuple[Any, list[str]]:
    """What a fresh process tells of the first case, and which heavy modules it imported."""
    given, out = folder / "cases.pt", folder / "out.pt"
    torch.save([(str(path), weights, runs) for path, weights, runs in cases], given)
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    script = HERE / "run_archive.py"
    done = subprocess.run(
        [sys.executable, str(script), str(given), str(out)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told, heavy = torch.load(out, weights_only=False)
    return told[0], heavy


# ---- every model, its pieces run as they are -------------------------------------------------------------------------


def _as_loaded(model: nn.Module, example: dict[str, Any], cache: Any, folder: Path, **options: Any) -> LoadedModel:
    """What an archive would be loaded as, but for the compiler: its programs are the graphs of the pieces."""
    parsed = parse_options({"cache": cache, **options})
    archive = _Archive(model, folder / "none.cpz", parsed)
    archive.add_size((), _torch.map_tensors(_dense, example))
    stored = {name: Stored("", Form.of(value), "") for name, value in archive.constants.items()}
    manifest = from_dict(json.loads(json.dumps(to_dict(archive._manifest({}, stored, {}), "export"))), "export")
    held = {**dict(model.named_buffers(remove_duplicate=False)), **dict(model.named_parameters(remove_duplicate=False))}
    loaded = LoadedModel(manifest, {**held, **archive.constants})
    programs = {name: functools.partial(_eagerly, gm) for name, gm in archive.pieces.graphs.items()}
    (size,) = manifest.sizes
    loaded.serve(
        size, dispatcher_of(size, LoadedProgram(size, programs, archive.method), archive.method, parsed, loaded)
    )
    return loaded


def _eagerly(gm: Any, given: list[Any]) -> list[torch.Tensor]:
    for value, node in zip(given, gm.graph.find_nodes(op="placeholder"), strict=True):
        assert _lie_alike(value, node.meta["val"]), "a piece is given what it is compiled for"
    found = gm(*given)
    given.clear()
    for value, node in zip(found, returned_by(gm.graph), strict=True):
        assert _lie_alike(value, node.meta["val"]), "a piece gives what the next one is compiled for"
    return list(found)


EVERY = [name for name in ZOO if is_one_graph(name)]
SIZES_DEPEND_ON_DATA = {"MochiTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel"}
METHODS_OF_ALL = ["taylorseer", "first_block_cache", "invariant"]
SOME = [
    "QwenImageTransformer2DModel",
    "CogVideoXTransformer3DModel",
    "PixArtTransformer2DModel",
    "ZImageTransformer2DModel",
]


@pytest.mark.parametrize(
    ("name", "kind"),
    sweep_over(
        [
            (name, kind)
            for name in EVERY
            for kind in METHODS_OF_ALL
            if (name, kind) != ("DiTTransformer2DModel", "invariant")
        ],
        zip(SOME, ["taylorseer", "first_block_cache", "invariant", "taylorseer"], strict=True),
    ),
)
@pytest.mark.filterwarnings("ignore::cachepass.CachepassWarning")  # distances differ from model to model
def test_pieces_of_every_model(name, kind, tmp_path):
    caches = {"taylorseer": {**TAYLOR, "taylor_factors_dtype": None}, "invariant": {"method": "invariant"}}
    cache = caches.get(kind, {"method": "first_block_cache", "threshold": 0.5})
    model = build(name, layers=4)
    options = {"cache": cache, "num_inference_steps": 6, "timestep_scale": 1.0}
    steps = [one for _, one in trajectory(name, 6)]
    if name in SIZES_DEPEND_ON_DATA:
        with pytest.raises(cachepass.ExportError, match="sizes are not known before it runs"):
            _as_loaded(model, steps[0], cache, tmp_path, num_inference_steps=6, timestep_scale=1.0)
        return
    loaded = _as_loaded(model, steps[0], cache, tmp_path, num_inference_steps=6, timestep_scale=1.0)
    found = [first_tensor(loaded(**one)).clone() for one in steps]
    marks = cachepass.summary(loaded).last_runs
    reference = torch.compile(
        model, backend="cached_inductor", fullgraph=True, options={**options, "lowering": "eager"}
    )
    expected = [first_tensor(reference(**one)).clone() for one in steps]
    assert max(map(relative_error, found, expected)) <= 1e-5
    assert marks == cachepass.summary(reference).last_runs


class _Counted(Transformer):
    """Its timestep is a number of Python's."""

    def forward(self, x, timestep, context=None):
        return super().forward(x, torch.full((x.shape[0],), timestep))


def test_a_timestep_may_be_a_number(tmp_path):
    model = _Counted(depth=3).eval().requires_grad_(False)
    run = [(x, float(t[0])) for x, t in calls(6)]
    loaded = _as_loaded(model, dict(zip(("x", "timestep"), run[0], strict=True)), TAYLOR, tmp_path)
    reference = compiled(model, num_inference_steps=None)
    assert all(torch.equal(loaded(x, t), reference(x, t)) for x, t in run)
    with pytest.raises(cachepass.ArchiveError, match="argument timestep: expected a number, got a Tensor"):
        loaded(run[0][0], torch.ones(2))
    with pytest.raises(cachepass.ExportError, match="argument timestep: it is an int"):
        _as_loaded(model, {"x": run[0][0], "timestep": 900}, TAYLOR, tmp_path)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_archive_on_cuda(tmp_path):
    model, path = transformer(depth=4).cuda(), tmp_path / "cuda.cpz"
    run = [(x.cuda(), t.cuda()) for x, t in calls(9)]
    cachepass.export(model, *run[0], cache=TAYLOR, path=path, options={"num_inference_steps": 9})
    loaded, reference = cachepass.load(path, model), compiled(model)
    for x, t in run:
        torch.testing.assert_close(loaded(x, t), reference(x, t), rtol=1e-4, atol=1e-4)
    assert cachepass.summary(loaded).last_runs == {"default": {"taylorseer": "##.#..#.."}}


# ---- one archive, tried in many ways ---------------------------------------------------------------------------------


def _make(path: Path) -> cachepass.Exported:
    """A small model for two sizes of latents, with weights inside."""
    model = transformer(depth=4)
    x, t = calls(1)[0]
    return cachepass.export(
        model, x, t, cache=TAYLOR, path=path, weights="inside", shapes=[{"x": torch.cat([x, x], 1)}],
        options={"num_inference_steps": 9, **QUICK},
    )  # fmt: skip


@pytest.fixture
def archive(tmp_path_factory):
    with torch.enable_grad():  # as in a user's process
        return exported_once(tmp_path_factory, "small", _make)[0]


def compiled(model, **options):
    options = {"cache": TAYLOR, "num_inference_steps": 9, "lowering": "eager", **options}
    return torch.compile(model, backend="cached_inductor", fullgraph=True, options=options)


def agree(loaded, model, steps=9, wide=False):
    """A run of the loaded model and of the compiled one."""
    for x, t in calls(steps):
        x = torch.cat([x, x], 1) if wide else x
        torch.testing.assert_close(loaded(x, t), model(x, t), rtol=1e-5, atol=2e-5)


@pytest.mark.inductor
def test_one_archive_has_several_sizes(archive):
    loaded, model = cachepass.load(archive), compiled(transformer(depth=4))
    agree(loaded, model)
    torch._dynamo.reset()
    agree(loaded, compiled(transformer(depth=4)), wide=True)
    with pytest.raises(cachepass.ArchiveError, match=r"argument x: .*2x5x8(.|\n)*There are: x 2x4x8.*; x 2x8x8"):
        loaded(torch.randn(2, 5, 8), torch.ones(2))


@pytest.mark.inductor
def test_it_is_called_like_the_model(archive):
    """By position or name; and everything that is known of compiled models is known of it."""
    loaded = cachepass.load(archive)
    (x, t), *rest = calls(9)
    first = loaded(x=x, timestep=t, context=None)
    for x, t in rest:
        loaded(x, timestep=t)
    assert cachepass.summary(loaded).last_runs == {"default": {"taylorseer": "##.#..#.."}}
    x, t = calls(1)[0]
    assert torch.equal(loaded(x, t), first)  # a run is over after nine steps
    loaded(*calls(2)[1])
    cachepass.reset(loaded)
    assert torch.equal(loaded(x, t), first)
    with cachepass.cache_context("another"):
        assert torch.equal(loaded(x, t), first)
    assert cachepass.summary(loaded).contexts == ("default", "another")
    cachepass.warmup(loaded, x, t)
    assert cachepass.summary(loaded).contexts == ("default", "another")
    with (
        cachepass.cache_context("request"),
        loaded.cache_context("cond", step_index=0, sigma=None),
    ):  # as Wan's pipeline
        assert torch.equal(loaded(x, t), first)
    assert cachepass.summary(loaded).contexts == ("default", "another", "request/cond")
    assert str(inspect.signature(loaded.forward)) and "exported for cpu" in repr(loaded)


@pytest.mark.inductor
def test_another_number_of_steps(archive):
    loaded = cachepass.load(archive, num_inference_steps=5)
    for _ in range(2):
        for x, t in calls(5):
            loaded(x, t)
    assert cachepass.summary(loaded).last_runs == {"default": {"taylorseer": "##.#."}}


@pytest.mark.inductor
def test_threads_share_a_loaded_model(archive):
    """Requests in contexts of their own, at once: each gets what it gets alone."""
    loaded = cachepass.load(archive)
    seeds = range(6)

    def request(seed: int, name: str) -> torch.Tensor:
        with torch.no_grad(), cachepass.cache_context(f"{name}-{seed}"):
            return torch.stack([loaded(x, t) for x, t in calls(9, seed)])

    alone = [request(seed, "alone") for seed in seeds]
    with ThreadPoolExecutor(len(seeds)) as pool:
        together = list(pool.map(lambda seed: request(seed, "together"), seeds))
    assert all(map(torch.equal, alone, together))


@pytest.mark.inductor
def test_what_no_trajectory_has_is_computed(archive):
    """Outside of the steps of a run nothing is kept: two calls that nothing tells apart."""
    loaded, model = cachepass.load(archive), transformer(depth=4)
    loaded(*calls(1)[0])
    program = next(d.program for d in cachepass.run.dispatch.LIVE if d.instances.of(loaded))
    assert program is not None
    x, t = calls(1)[0]
    plain = program.compile(cachepass.program.phases.Phase(route=cachepass.recipe.vocabulary.PLAIN))
    weights = [dict(loaded.named_parameters())[w.name] for w in loaded._manifest.sizes[0].weights]
    given = iter(weights)
    inputs = [
        {"x": x, "timestep": t}[source.name] if source in loaded._manifest.sizes[0].arguments else next(given)
        for source in loaded._manifest.sizes[0].inputs
    ]
    flat = [inputs[i] for i in loaded._manifest.sizes[0].binding.inputs]
    torch.testing.assert_close(plain.run(flat)[0], model(x, t))


@pytest.mark.inductor
def test_weights_are_inputs(archive):
    """Replaced one by one, loaded, swapped with a LoRA's: the next call runs with what is there."""
    other = transformer(seed=1, depth=4)
    loaded = cachepass.load(archive)
    agree(loaded, compiled(transformer(depth=4)), steps=2)
    loaded.load_state_dict(other.state_dict())
    cachepass.reset(loaded)
    torch._dynamo.reset()
    agree(loaded, compiled(other))
    lora = torch.randn(8, 1) @ torch.randn(1, 8)
    other.blocks[2].attn.q.weight = nn.Parameter(other.blocks[2].attn.q.weight + lora)
    loaded.get_submodule("blocks.2.attn.q").weight = nn.Parameter(other.blocks[2].attn.q.weight.clone())
    cachepass.reset(loaded)
    torch._dynamo.reset()
    agree(loaded, compiled(other))
    assert loaded.state_dict().keys() == other.state_dict().keys()


@pytest.mark.inductor
def test_weights_come_from_everywhere_and_are_not_copied(archive, tmp_path):
    from safetensors.torch import save_file

    model = transformer(seed=1, depth=4)
    state = model.state_dict()
    save_file(state, tmp_path / "a.safetensors")
    for weights in (state, model, tmp_path, str(tmp_path / "a.safetensors")):
        loaded = cachepass.load(archive, weights)
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, state[name])
            assert isinstance(weights, (str, Path)) or value.data_ptr() == state[name].data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if "blocks.1" not in k}, r"12 of 50 tensors are missing: blocks.1"),
        (lambda s: {**s, "proj_out.weight": torch.ones(8, 9)}, "weight proj_out.weight: expected 8x8 float32 on cpu"),
        (lambda s: {**s, "proj_out.weight": torch.ones(8, 8).half()}, "expected 8x8 float32 on cpu, got 8x8 float16"),
        (lambda _: 3, "expected a state dict, a module or a path, got int"),
        (lambda _: "nowhere.safetensors", "there is no .safetensors file"),
    ],
)
@pytest.mark.inductor
def test_weights_that_do_not_fit(archive, tmp_path, change, message):
    without = tmp_path / "without.cpz"
    _rewritten(archive, without, lambda saved: saved["manifest"].update(weights=[]))
    with pytest.raises(cachepass.ArchiveError, match=message):
        cachepass.load(without, change(transformer(depth=4).state_dict()))


@pytest.mark.inductor
def test_weights_that_do_not_fit_any_more(archive):
    loaded = cachepass.load(archive)
    x, t = calls(1)[0]
    first = loaded(x, t)
    kept = loaded.get_submodule("proj_out").weight
    for wrong, message in (
        (torch.ones(8, 9), "expected 8x8"),
        (torch.ones(8, 8).t()[::1].t().contiguous().t(), "its strides are"),
        (torch.ones(8, 8).double(), "float64"),
    ):
        loaded.get_submodule("proj_out").weight = nn.Parameter(wrong, requires_grad=False)
        cachepass.reset(loaded)
        with pytest.raises(cachepass.ArchiveError, match=f"weight proj_out.weight: .*{message}"):
            loaded(x, t)
    loaded.get_submodule("proj_out").weight = kept
    assert torch.equal(loaded(x, t), first)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"x": torch.randn(2, 4, 8).double()},
            "argument x: expected a tensor of 2x4x8 float32 on cpu, got one of",
        ),
        ({"x": None}, "argument x: expected a tensor of 2x4x8 float32 on cpu, got None"),
        ({"timestep": torch.ones(3)}, "argument timestep: expected a tensor of 2 float32"),
        (
            {"context": torch.randn(2, 3, 8)},
            "argument context: it was None when the model was exported, and is a tensor",
        ),
    ],
)
@pytest.mark.inductor
def test_calls_that_do_not_fit(archive, given, message):
    x, t = calls(1)[0]
    loaded = cachepass.load(archive)
    first = loaded(x, t)
    cachepass.reset(loaded)
    with pytest.raises(cachepass.ArchiveError, match=message):
        loaded(**{"x": x, "timestep": t, **given})
    assert torch.equal(loaded(x, t), first)
    with pytest.raises(TypeError, match="unexpected keyword"):
        loaded(x, t, whatever=1)


@pytest.mark.inductor
def test_inputs_that_lie_otherwise_are_copied(archive):
    loaded = cachepass.load(archive)
    x, t = calls(1)[0]
    first = loaded(x, t)
    for one in (
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    ):
        cachepass.reset(loaded)
        assert torch.equal(loaded(one, t[:1].expand(2)), first)


# ---- pipelines -------------------------------------------------------------------------------------------------------


@pytest.mark.inductor
def test_a_pipeline_takes_a_loaded_transformer(tmp_path):
    """The pipeline says how it calls its transformer, twice per step; and calls what was loaded in the same way."""
    from pipelines import PIPELINES

    from cachepass.integrations.diffusers import enable_cache, export

    case = PIPELINES["Flux"]
    pipe, path = case.make(), tmp_path / "flux.cpz"
    inputs = {**case.inputs(), "num_inference_steps": 8}
    made = export(pipe, **inputs, cache=TAYLOR, path=path, options={"timestep_scale": 1000.0, **QUICK})
    assert len(made.sizes) == 1
    own = pipe.transformer
    pipe.transformer = loaded = cachepass.load(path, own)
    images = [case.run(pipe, 8, seed) for seed in (0, 1)]
    marks = cachepass.summary(loaded).last_runs
    assert marks.keys() == {"cond", "uncond"} and marks["cond"] == {"taylorseer": "##.#..#."}
    pipe.transformer = own
    enable_cache(pipe, TAYLOR, num_inference_steps=8, lowering="eager")
    for seed, image in enumerate(images):
        assert relative_error(image, case.run(pipe, 8, seed)) <= 1e-4


# ---- blocks of a live model ------------------------------------------------------------------------------------------


def _make_blocks(path: Path) -> cachepass.Exported:
    x, t = calls(1)[0]
    options = {"num_inference_steps": 9, **QUICK}
    return cachepass.export(transformer(depth=4), x, t, cache=TAYLOR, path=path, blocks=True, options=options)


@pytest.fixture
def blocks(tmp_path_factory):
    return exported_once(tmp_path_factory, "blocks", _make_blocks)[0]


@pytest.mark.inductor
def test_blocks_of_a_live_model_run_the_programs(blocks):
    model = cachepass.apply(transformer(depth=4), blocks)
    for _ in range(2):
        torch._dynamo.reset()
        agree(model, compiled(transformer(depth=4)))
    summary = cachepass.summary(model)
    assert summary.last_runs == {"default": {"taylorseer": "##.#..#.."}} and summary.runs == 2
    assert summary.modules == tuple(f"blocks.{i}.attn" for i in range(4))
    model.blocks[1].ff.up.weight = nn.Parameter(model.blocks[1].ff.up.weight + 0.1)
    other = transformer(depth=4)
    other.blocks[1].ff.up.weight = nn.Parameter(other.blocks[1].ff.up.weight + 0.1)
    torch._dynamo.reset()
    agree(model, compiled(other))
    with pytest.raises(cachepass.ArchiveError, match=r"blocks.0, argument x: expected a tensor of 2x4x8"):
        model(torch.randn(2, 5, 8), calls(1)[0][1])


@pytest.mark.inductor
def test_blocks_of_other_models(archive, blocks):
    fewer, wider = transformer(depth=3), transformer(depth=4, width=16)
    with pytest.raises(cachepass.ArchiveError, match=r"apply, blocks.3: expected a Block, and there is none"):
        cachepass.apply(fewer, blocks)
    with pytest.raises(cachepass.ArchiveError, match=r"weight norm.weight: expected 8 float32 on cpu, got 16"):
        cachepass.apply(wider, blocks)
    assert all("forward" not in vars(block) for model in (fewer, wider) for block in model.blocks)
    with pytest.raises(cachepass.ArchiveError, match=r"programs of blocks(.|\n)*cachepass.apply"):
        cachepass.load(blocks)
    with pytest.raises(cachepass.ArchiveError, match=r"programs of a whole model(.|\n)*cachepass.load"):
        cachepass.apply(transformer(depth=4), archive)


# ---- archives that cannot run here -----------------------------------------------------------------------------------


def _rewritten(archive: Path, path: Path, change: Any) -> None:
    """A copy of an archive with another manifest, sealed anew."""
    from hashlib import sha256

    from cachepass._torch.ahead import ArchiveWriter
    from cachepass.ship.records import CONFIG, MANIFEST, SEAL

    reader = Archive(archive).reader
    saved = json.loads(reader.read(MANIFEST))
    change(saved)
    text = json.dumps(saved).encode()
    seal = {MANIFEST: sha256(text).hexdigest(), CONFIG: sha256(reader.read(CONFIG)).hexdigest()}
    with ArchiveWriter(path) as writer:
        for name in reader.names:
            if not name.startswith(("archive_", ".", "byteorder", "version")) and name not in (MANIFEST, SEAL):
                writer.add(name, reader.read(name))
        writer.add(MANIFEST, text)
        writer.add(SEAL, json.dumps(seal).encode())


def _built(**fields):
    return lambda saved: saved["manifest"]["built"].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_built(torch="2.3.0"), "exported with torch 2.3.0, and this is"),
        (_built(system="Plan9 mips"), "exported for Plan9 mips, and this is"),
        (_built(device="cuda", capability="9.0"), "exported for cuda, and there is no such device here"),
        (_built(capability="AVX9000"), "a cpu device with AVX9000, and this one has"),
        (lambda saved: saved.update(schema=99), "schema 99 is not 1(.|\\n)*export it anew"),
    ],
)
@pytest.mark.inductor
def test_archives_of_other_machines(archive, tmp_path, change, message):
    if torch.cuda.is_available() and "cuda" in message:
        pytest.skip("there is such a device")
    _rewritten(archive, tmp_path / "other.cpz", change)
    with pytest.raises(cachepass.ArchiveError, match=message):
        cachepass.load(tmp_path / "other.cpz")


@pytest.mark.inductor
def test_damaged_archives(archive, tmp_path):
    data = archive.read_bytes()
    damaged = tmp_path / "damaged.cpz"
    reader = Archive(archive).reader
    program = next(name for name in reader.names if name.endswith(".so"))
    inside = reader._reader.get_record_offset(program) + 5000
    for broken in (data[: len(data) // 2], b"no zip at all", data[:inside] + b"\x00" * 64 + data[inside + 64 :]):
        damaged.write_bytes(broken)
        with pytest.raises(cachepass.ArchiveError, match="it is no archive of cachepass, or it is damaged"):
            cachepass.load(damaged)
    with zipfile.ZipFile(damaged, "w") as other:
        other.writestr("model/data.pkl", b"")
    with pytest.raises(cachepass.ArchiveError, match="damaged"):
        cachepass.load(damaged)
    with pytest.raises(cachepass.ArchiveError, match="there is no such file"):
        cachepass.load(tmp_path / "none.cpz")
    tensor = reader._reader.get_record_offset(next(name for name in reader.names if "/tensors/" in name))
    damaged.write_bytes(data[:tensor] + b"\xff" + data[tensor + 1 :])
    result = CliRunner().invoke(main, ["inspect", str(damaged)])
    assert result.exit_code == 1 and "is not what was written" in result.output


# ---- what cannot be exported -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cache": None}, cachepass.ExportError, "expected a method, got None"),
        ({"cache": {**TAYLOR, "disable_cache_before_step": 99}}, cachepass.ExportError, "the cache never fires"),
        ({"weights": "outside"}, cachepass.ExportError, "expected 'none' or 'inside'"),
        ({"options": {"lowering": "cond"}}, cachepass.ExportError, "has no straight lines"),
        ({"options": {"whatever": 1}}, cachepass.OptionError, "unknown option"),
        (
            {"cache": cachepass.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 1)},
            cachepass.ExportError, "current_timestep_callback: a function of Python's",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_exported(arguments, error, message, tmp_path):
    x, t = calls(1)[0]
    options = {"num_inference_steps": 9, **arguments.pop("options", {})}
    path = tmp_path / "none.cpz"
    with pytest.raises(error, match=message):
        cachepass.export(transformer(), x, t, **{"cache": TAYLOR, "path": path, **arguments}, options=options)
    assert not path.exists() and not list(tmp_path.iterdir())


class _Returning(Transformer):
    def __init__(self, what) -> None:
        super().__init__()
        self.what = what

    def forward(self, x, timestep, context=None, extra=None):
        return self.what(super().forward(x, timestep), x)


@pytest.mark.parametrize(
    ("what", "kwargs", "message"),
    [
        (lambda y, x: (y, x.view(-1)), {}, "shares its memory"),
        (lambda y, _: {"a": y, "b": y.dtype}, {}, "returns a dtype that is not made in its graph"),
        (lambda y, _: y, {"extra": object()}, "argument extra: a object cannot be taken along"),
    ],
)
def test_calls_that_cannot_be_exported(what, kwargs, message, tmp_path):
    x, t = calls(1)[0]
    with pytest.raises(cachepass.CachepassError, match=message):
        cachepass.export(_Returning(what).eval(), x, t, **kwargs, cache=TAYLOR, path=tmp_path / "none.cpz")


# ---- pieces ----------------------------------------------------------------------------------------------------------


def block(x, w):
    return torch.relu(x @ w.t()) + x


class Goldens(TestCase):
    def test_calls_and_what_stands_between_them(self):
        """What repeats is called; views and copies are no programs; a slot is written right behind the call."""

        def model(x, slot, *ws):
            for w in ws[:-1]:
                x = block(x, w)
            slot.copy_(x.half())
            return block(x, ws[-1])[:, 1:], x.t().sin()

        inputs = torch.ones(2, 4), torch.empty(2, 4, dtype=torch.half), *(torch.randn(4, 4) for _ in range(9))
        pieces = Pieces()
        listing = cut_up(_shared(model, *inputs), "compute", pieces, inputs=11)
        self.assertExpectedInline(
            "\n" + "\n".join(listing.lines()),
            """\

program compute 11
call compute.block 2 0 -> 11
call compute.block 3 11 -> 12
call compute.block 4 12 -> 13
call compute.block 5 13 -> 14
call compute.block 6 14 -> 15
call compute.block 7 15 -> 16
call compute.block 8 16 -> 17
call compute.block 9 17 -> 18
copy 18 1
call compute.block 10 18 -> 19
call compute.2 18 -> 20
view 19 21 2 3 | 4 1 | 1
results 21 20
end""",
        )
        self.assertExpectedInline(", ".join(pieces.graphs), """compute.block, compute.2""")


def _shared(function, *inputs):
    gm = make_fx(function, tracing_mode="fake")(*inputs)
    return share(gm)[0]


def test_a_listing_runs_in_order_and_lets_go():
    import weakref

    alive: list[weakref.ref[torch.Tensor]] = []

    def double(given):
        assert sum(ref() is not None for ref in alive) <= 1
        (value,) = given
        alive.append(weakref.ref(result := value * 2))
        given.clear()
        return [result]

    steps = (Call("double", (0,), (2,)), Call("double", (2,), (3,)), View(3, 4, (2,), (1,), 1), Copy(4, 1))
    listing = Listing("compute", 2, steps, (4,))
    given = [torch.arange(3.0), torch.zeros(2)]
    slot = given[1]
    (result,) = listing.linked({"double": double})(given)
    assert result.tolist() == slot.tolist() == [4, 8] and not given


# ---- the command line, and C++ ---------------------------------------------------------------------------------------


@pytest.mark.inductor
def test_commands(archive, tmp_path):
    invoke = CliRunner().invoke
    told = invoke(main, ["inspect", str(archive)]).output
    assert "Transformer, taylorseer(" in told and "verified" in told and "inputs: x 2x8x8" in told
    rows = json.loads(invoke(main, ["run", str(archive), "--json", "--rounds", "1"]).output)
    assert {row["phase"]: row["calls"] for row in rows} == {"compute": 4, "predict": 5}
    lines = invoke(main, ["inspect", str(archive), "--timetable"]).output.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == [
        {"#": "compute", ".": "predict"}[mark] for mark in "##.#..#.."
    ]
    source = tmp_path / "model.py"
    source.write_text("def make(): raise SystemExit(3)\n")
    assert invoke(main, ["export", f"{source}:make", "--out", str(tmp_path / "x.cpz")]).exit_code == 3


@pytest.mark.inductor
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake and a C++ compiler")
def test_the_digits_in_cpp(tmp_path):
    """examples/cpp builds, and makes the image that Python makes, in 50 steps by the timetable."""
    sys.path.insert(0, str(HERE.parent / "examples" / "digits"))
    import demo
    from models import load_dit

    noise, labels = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(2)
    scheduler = demo._scheduler(50)
    path, config = tmp_path / "digits.cpz", demo.METHODS["TaylorSeer, blocks"]
    inputs = demo._inputs(noise, labels, scheduler.timesteps[0])
    options = {"num_inference_steps": 50, **QUICK}
    cachepass.export(load_dit(), **inputs, cache=config, path=path, weights="inside", options=options)
    expected = demo.sample(cachepass.load(path), noise, labels, 50, 2.0)
    eager = {"cache": config, "lowering": "eager", "num_inference_steps": 50}
    reference = torch.compile(load_dit(), backend="cached_inductor", fullgraph=True, options=eager)
    assert relative_error(expected, demo.sample(reference, noise, labels, 50, 2.0)) <= 1e-5
    built, given = tmp_path / "build", tmp_path / "inputs"
    given.mkdir()
    (given / "hidden_states").write_bytes(torch.cat([noise, noise]).numpy().tobytes())
    (given / "class_labels").write_bytes(inputs["class_labels"].numpy().tobytes())
    (given / "sigmas").write_text(" ".join(map(repr, scheduler.sigmas.tolist())))
    source = HERE.parent / "examples" / "cpp"
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["cmake", "-S", source, "-B", built, prefix], ["cmake", "--build", built]):
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
    out = tmp_path / "out"
    run = [built / "run", path, given, given / "sigmas", "2.0", out]
    subprocess.run(list(map(str, run)), check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    image = torch.frombuffer(bytearray(out.read_bytes()), dtype=torch.float32).view_as(noise).clamp(-1, 1)
    assert relative_error(image, expected) <= 1e-5
