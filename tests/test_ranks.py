"""Several ranks: all decide alike, as one process does with the whole sequence; collectives in the passes."""

from __future__ import annotations

import datetime
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn

from cachepass import CacheConfig, CachepassWarning, FirstBlockCacheConfig, MagCacheConfig, OptionError, _torch
from cachepass.forecast import Reuse
from cachepass.options import parse_options
from cachepass.program.phases import Phase
from cachepass.program.roles import Carried
from cachepass.program.specialize import up_to_decision
from cachepass.recipe.vocabulary import WHOLE
from cachepass.run.dispatch import LIVE
from cachepass.schedule import Every

WORLD = 2


def run_job(job: str, folder: Path) -> tuple[list[dict], dict]:
    """What each rank found, and what a process alone finds, by case."""
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), job]
    logs = [folder / f"{rank}.log" for rank in range(WORLD)]
    started = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            started.append(subprocess.Popen([*command, str(rank), str(WORLD), str(folder)], stdout=file, stderr=file))
    try:
        codes = [process.wait(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0] * WORLD, "\n\n".join(log.read_text()[-3000:] for log in logs)
    found = [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]
    alone = {name: result for _, own in found for name, result in own.items()}
    return [together for together, _ in found], alone


def assert_close(found: tuple, expected: tuple, tolerance: float) -> None:
    assert [d is None for d in found] == [d is None for d in expected]
    for a, b in zip(found, expected, strict=True):
        assert a is None or a == pytest.approx(b, abs=tolerance, rel=tolerance, nan_ok=True)


def assert_alike(name: str, together: list[dict], expected: dict) -> None:
    for found in (rank[name] for rank in together):
        assert found["graph_breaks"] == 0, name
        assert found["marks"] == expected["marks"], name
        assert_close(found["distances"], expected["distances"], 1e-6)
        torch.testing.assert_close(found["outputs"], expected["outputs"], rtol=1e-5, atol=1e-5, equal_nan=True)
        # Not only close: a threshold may lie between two numbers that are.
        assert repr(found["distances"]) == repr(together[0][name]["distances"]), name
    decided = "".join(expected["marks"].values())
    assert "magnitude" in name or (decided.count(".") >= 2 and decided.count("#") >= 2), name


@pytest.mark.parametrize("job", ["eager", pytest.param("compiled", marks=pytest.mark.inductor)])
def test_all_ranks_decide_as_one_process_does(job, tmp_path):
    together, alone = run_job(job, tmp_path)
    for name, case in ranks.JOBS[job].items():
        if case.grouped:
            assert_alike(name, together, alone[name])
    if job == "eager":
        assert sum(d is not None and math.isnan(d) for d in alone["context, nan"]["distances"]) == 2
        assert_would_differ(together, alone)


def assert_would_differ(together: list[dict], alone: dict) -> None:
    """Without a group: the distances that each rank has of its own tokens, and modes fitted to them."""
    own = [found["each alone"]["distances"][1:] for found in together]
    threshold = ranks.FIRST_BLOCK.threshold
    assert any((a <= threshold) != (b <= threshold) for a, b in zip(*own, strict=True))
    change = alone["context, modes"]["outputs"] - together[0]["each alone, modes"]["outputs"]
    assert change.abs().max() > 1e-4


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=datetime.timedelta(seconds=30)
    )
    yield dist.group.WORLD
    dist.destroy_process_group()


def compiled(model, cache=FirstBlockCacheConfig(threshold=0.05), **options):  # noqa: B008
    options = {"cache": cache, "lowering": "eager", **options}
    return torch.compile(model, backend="cached_inductor", fullgraph=True, options=options)


def test_a_group_needs_torch_distributed():
    with pytest.raises(OptionError, match=r'\["process_group"\]: torch.distributed is not initialised'):
        compiled(ranks.whole(), process_group="world")(*ranks.calls()[0])


@pytest.mark.parametrize("given", ["wrold", 1, -100, [0, 1]])
@pytest.mark.usefixtures("group")
def test_a_group_is_a_process_group(given):
    with pytest.raises(OptionError, match="expected a ProcessGroup of which this rank is a member, or 'world'"):
        compiled(ranks.whole(), process_group=given)(*ranks.calls()[0])


def test_a_group_is_given_or_is_the_default_one(group):
    assert all(
        parse_options({"process_group": given}, None, set(), {"default": {}}).process_group is group
        for given in (group, "world")
    )


@pytest.fixture
def two_ranks():
    """A process group that takes this process for the first of two, and whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize(("cache", "options", "warned"), [
    (FirstBlockCacheConfig(threshold=0.05), {}, True),
    (FirstBlockCacheConfig(threshold=0.05), {"process_group": "world"}, False),
    (CacheConfig(cut=r"blocks\.1", schedule=Every(2), forecast=Reuse()), {}, False),
    (MagCacheConfig(calibrate=True), {}, False),
])  # fmt: skip
def test_ranks_that_decide_each_by_itself_are_warned_of(cache, options, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CachepassWarning)
        compiled(Pairs().eval().requires_grad_(False), cache, **options)(torch.randn(2, 4, 8), torch.full((2,), 900.0))
    said = [str(w.message) for w in caught if "decide differently" in str(w.message)]
    assert len(said) == warned and all('options["process_group"] = "world"' in message for message in said)


# ---- collectives in the passes --------------------------------------------------------------------------------------


class Pair(nn.Module):
    """One collective for two values: the first is added to the stream here, the second one in the next block."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, more: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + self.one(more)
        one, two = functional.all_reduce_coalesced([self.one(x), self.two(x)], "sum", dist.group.WORLD)
        return x + one, two


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Pair() for _ in range(3)])

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        more = torch.zeros_like(x)
        for block in self.blocks:
            x, more = block(x, more)
        return x + more + timestep.view(-1, 1, 1) / 1e4


def programs_of(model, inputs, cache):
    """The program that a model was compiled to, after a run."""
    with torch.no_grad():
        call = compiled(model, cache)
        outputs = [call(*value) for value in inputs]
    program = next(d.program for d in LIVE if d.instances.root is not None and d.instances.root() is model)
    assert program is not None
    return program, outputs


def assert_waits_inside(graph) -> None:
    """Every collective is waited for in the graph in which it begins, and read behind the wait only."""
    for node in graph.nodes:
        if _torch.is_wait(node):
            source = node.args[0]
            begins = source.args[0] if source.op == "call_function" and not _torch.is_collective(source) else source
            assert _torch.is_collective(begins), f"{node} waits for what began elsewhere"
        elif _torch.is_collective(node):
            listed = isinstance(node.meta["val"], (list, tuple))
            values = list(node.users) if listed else [node]
            assert all(_torch.is_wait(user) for value in values for user in value.users), f"{node} is not waited for"


@pytest.mark.usefixtures("group")
def test_a_collective_is_waited_for_on_its_side_of_the_decision():
    torch.manual_seed(0)
    model = Pairs().eval().requires_grad_(False)
    inputs = [(torch.randn(2, 4, 8), torch.full((2,), 900.0 - 80 * step)) for step in range(4)]
    program, outputs = programs_of(model, inputs, FirstBlockCacheConfig(threshold=0.0))
    plain = [model(*call) for call in inputs]
    torch.testing.assert_close(outputs, plain)
    decide = up_to_decision(program.canonical(WHOLE), "decide")
    graphs = [decide.gm.graph, *(program.variant(Phase(p, WHOLE)).gm.graph for p in ((), ("blocks",)))]
    begun = [sum(_torch.is_collective(n) and not _torch.is_wait(n) for n in graph.nodes) for graph in graphs]
    assert begun == [1, 2, 0]
    for graph in graphs:
        assert_waits_inside(graph)
    assert len([role for role in decide.kept if isinstance(role, Carried)]) >= 2


@pytest.mark.usefixtures("group")
def test_a_branch_takes_no_collective_that_is_not_waited_for():
    """Of the first block's two values, one goes into the module that is cut and nowhere else."""
    torch.manual_seed(0)
    model = Pairs().eval().requires_grad_(False)
    inputs = [(torch.randn(2, 4, 8), torch.full((2,), 900.0 - 80 * step)) for step in range(4)]
    cache = CacheConfig(cut=r"blocks\.1\.one", schedule=Every(2), forecast=Reuse())
    program, _ = programs_of(model, inputs, cache)
    gm = program.canonical(WHOLE).gm
    branches = [gm.get_submodule(str(node.target)) for node in gm.graph.find_nodes(op="get_attr")]
    assert len(branches) == 4  # the module is called twice
    for part in (gm, *branches):
        assert_waits_inside(part.graph)


@pytest.mark.usefixtures("group")
def test_a_collective_is_not_computed_once():
    """Another rank's input may change while this one's stays the same: only what is of this rank alone is kept."""
    model = ranks.tensor_parallel(0, 1)
    program, _ = programs_of(model, ranks.calls(), FirstBlockCacheConfig(threshold=0.0))
    hoisted = program.full.hoisted
    assert hoisted is not None
    assert hoisted.operations > 3
    assert not any(map(_torch.is_collective, hoisted.once.graph.nodes))
    rest = program.canonical(WHOLE).gm.graph
    assert sum(map(_torch.is_wait, rest.nodes)) >= 2
