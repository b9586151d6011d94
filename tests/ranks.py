"""A small transformer on several ranks, and what each rank of a job does: run as a script by ``test_ranks.py``.

``python ranks.py JOB RANK WORLD FOLDER`` writes ``FOLDER/RANK.pt``: for each case of the job the run on several ranks
and, for every WORLDth method, that of the whole model in one process.
"""

from __future__ import annotations

import datetime
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import gelu, linear, scaled_dot_product_attention

import cachepass
from cachepass import CacheConfig, FirstBlockCacheConfig, MagCacheConfig, TeaCacheConfig
from cachepass.cut import Blocks, Latents
from cachepass.forecast import DMD, Taylor
from cachepass.schedule import Every, Threshold, WarmUp
from cachepass.testing import count_compiles

WIDTH, HEADS, TOKENS, STEPS = 16, 4, 8, 10


class Column(nn.Linear):
    """Of a layer's output this rank has a part."""

    def split(self, rank: int, world: int) -> None:
        self.weight = nn.Parameter(self.weight.chunk(world)[rank].clone(), requires_grad=False)
        self.bias = nn.Parameter(self.bias.chunk(world)[rank].clone(), requires_grad=False)


class Row(nn.Linear):
    """Of a layer's input this rank has a part; the outputs are added up."""

    parallel = False

    def split(self, rank: int, world: int) -> None:
        self.weight = nn.Parameter(self.weight.chunk(world, 1)[rank].clone(), requires_grad=False)
        self.parallel = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.parallel:
            return super().forward(x)
        return functional.all_reduce(linear(x, self.weight), "sum", dist.group.WORLD) + self.bias


class Attention(nn.Module):
    """Self-attention; ``gathers``: each rank has some of the tokens, and gets the keys and values of all."""

    gathers = False

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = Column(WIDTH, WIDTH), Column(WIDTH, WIDTH), Column(WIDTH, WIDTH)
        self.out = Row(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.gathers:
            k, v = (functional.all_gather_tensor(value.contiguous(), 2, dist.group.WORLD) for value in (k, v))
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Column(WIDTH, 2 * WIDTH), Row(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.norm2, self.ff = nn.LayerNorm(WIDTH), FeedForward()

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x)) * torch.cos(timestep / 1000).view(-1, 1, 1)
        return x + self.ff(self.norm2(x))


class Transformer(nn.Module):
    """``text`` is refined by layers that depend on nothing else, and added to the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.refine = nn.Sequential(Column(WIDTH, 2 * WIDTH), nn.GELU(), Row(2 * WIDTH, WIDTH))
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.proj_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = x + self.refine(text).mean(1, keepdim=True)
        for block in self.blocks:
            x = block(x, timestep)
        return self.proj_out(x)


def whole() -> Transformer:
    torch.manual_seed(0)
    return Transformer().eval().requires_grad_(False)


def tensor_parallel(rank: int, world: int) -> Transformer:
    """Heads and hidden features are split; the tokens are everywhere."""
    model = whole()
    for module in model.modules():
        if isinstance(module, (Column, Row)):
            module.split(rank, world)
    return model


def context_parallel(rank: int, world: int) -> Transformer:  # noqa: ARG001
    """Tokens are split; the weights are everywhere."""
    model = whole()
    for block in model.blocks:
        block.attn.gathers = True
    return model


def dtensor_parallel(rank: int, world: int) -> Transformer:  # noqa: ARG001
    """As ``tensor_parallel``, by torch's own means."""
    model = whole()
    plan = {
        f"{path}.{name}": style()
        for path in ("attn", "ff")
        for name, style in (
            ("q", ColwiseParallel),
            ("k", ColwiseParallel),
            ("v", ColwiseParallel),
            ("out", RowwiseParallel),
            ("up", ColwiseParallel),
            ("down", RowwiseParallel),
        )
        if hasattr(getattr(model.blocks[0], path), name)
    }
    for block in model.blocks:
        parallelize_module(block, init_device_mesh("cpu", (world,)), plan)
    return model


def calls(nan_at: int | None = None) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The inputs of a run: the first half of the tokens hardly changes, the second half does in every third step."""
    generator = torch.Generator().manual_seed(3)
    x, text = (torch.randn(2, TOKENS, WIDTH, generator=generator) for _ in range(2))
    made = []
    for step in range(STEPS):
        x = x + 0.002 * torch.randn(x.shape, generator=generator)
        if step % 3 == 2:
            x[:, TOKENS // 2 :] += 0.4 * torch.randn(2, TOKENS // 2, WIDTH, generator=generator)
        value = x.clone()
        if step == nan_at:
            value[0, -1, 0] = torch.nan
        made.append((value, torch.full((2,), 900.0 - 80 * step), text))
    return made


def run(model: nn.Module, cache: object, inputs: list[tuple[torch.Tensor, ...]], **options: Any) -> dict[str, Any]:
    """Outputs, distances and decisions of a run, with the compiler's counts."""
    options = {"cache": cache, "lowering": "eager", "num_inference_steps": STEPS, **options}
    with count_compiles() as counts, torch.no_grad():
        compiled = torch.compile(model, backend="cached_inductor", fullgraph=True, options=options)
        outputs = [compiled(*call) for call in inputs]
    summary = cachepass.summary(compiled)
    marks = next(iter(summary.last_runs.values()), {})
    return {
        "outputs": torch.stack(outputs),
        "distances": next(iter(summary.distances.values()), ()),
        "marks": marks,
        "graph_breaks": counts.graph_breaks,
    }


@dataclass(frozen=True)
class Case:
    """A method, on ranks that share the work in one of two ways."""

    cache: Any
    split: str = "context"
    grouped: bool = True
    nan_at: int | None = None
    fresh_text: bool = False  # on all ranks but the first, another tensor of the same values in every step
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def alone(self) -> tuple[object, ...]:
        """Equal for cases that one process alone runs alike."""
        return id(self.cache), self.nan_at, self.fresh_text

    def inputs(self, *, fresh_text: bool) -> list[tuple[torch.Tensor, ...]]:
        made = calls(self.nan_at)
        return [(x, t, text.clone()) for x, t, text in made] if fresh_text else list(made)


FIRST_BLOCK = FirstBlockCacheConfig(threshold=0.1)
LATENTS = CacheConfig(cut=Blocks(first=1), schedule=Threshold(0.05), forecast=Taylor(1), probe=Latents())
MODES = CacheConfig(cut=Blocks(first=1), schedule=Every(2) & WarmUp(4), forecast=DMD(history=4, rank=2))
MEASURE = CacheConfig(cut=Blocks(first=1), schedule=Threshold(0.0))
JOBS = {
    "eager": {
        "tensor": Case(FIRST_BLOCK, "tensor", fresh_text=True),
        "tensor, modes": Case(MODES, "tensor"),
        "tensor, dtensor": Case(LATENTS, "dtensor"),
        "context": Case(FIRST_BLOCK),
        "context, per sample": Case(LATENTS),
        "context, accumulated": Case(TeaCacheConfig(rel_l1_thresh=0.1)),
        "context, magnitude": Case(MagCacheConfig(calibrate=True)),
        "context, modes": Case(MODES),
        "context, nan": Case(LATENTS, nan_at=6),
        "each alone": Case(MEASURE, grouped=False),
        "each alone, modes": Case(MODES, grouped=False),
    },
    "compiled": {
        "specialize": Case(FIRST_BLOCK, options={"lowering": "specialize"}),
        "cond": Case(FIRST_BLOCK, options={"lowering": "cond"}),
    },
}
SPLITS = {"tensor": tensor_parallel, "dtensor": dtensor_parallel, "context": context_parallel}


def run_case(case: Case, rank: int, world: int) -> dict[str, Any]:
    inputs = case.inputs(fresh_text=case.fresh_text and rank > 0)
    if case.split == "context":
        inputs = [(x.chunk(world, 1)[rank], t, text) for x, t, text in inputs]
    options = {**({"process_group": "world"} if case.grouped else {}), **case.options}
    found = run(SPLITS[case.split](rank, world), case.cache, inputs, **options)
    if case.split == "context":
        parts = [torch.empty_like(found["outputs"]) for _ in range(world)]
        dist.all_gather(parts, found["outputs"].contiguous())
        found["outputs"] = torch.cat(parts, 2)
    return found


def main(job: str, rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
    )
    cases = JOBS[job]
    together = {name: run_case(case, rank, world) for name, case in cases.items()}
    wanted = list(dict.fromkeys(case.alone for case in cases.values() if case.grouped))
    alone = {}
    for key in wanted[rank::world]:
        names = [name for name, case in cases.items() if case.alone == key]
        case = cases[names[0]]
        alone |= dict.fromkeys(names, run(whole(), case.cache, case.inputs(fresh_text=case.fresh_text)))
    torch.save((together, alone), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
