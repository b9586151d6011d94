"""Small transformers outside diffusers, for tests of the passes and of the runtime."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention


class Attention(nn.Module):
    """Self- or cross-attention with one head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        k, v = self.kv(x if context is None else context).chunk(2, -1)
        return self.out(scaled_dot_product_attention(self.q(x)[:, None], k[:, None], v[:, None])[:, 0])


class FeedForward(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, width: int = 8, cross: bool = False) -> None:
        super().__init__()
        self.norm, self.attn, self.ff = nn.LayerNorm(width), Attention(width), FeedForward(width)
        self.cross = Attention(width) if cross else None

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.attn(self.norm(x)) * torch.cos(timestep / 1000).view(-1, 1, 1)
        if self.cross is not None:
            x = x + self.cross(x, context)
        return x + self.ff(x)


class Transformer(nn.Module):
    """``blocks`` then ``proj_out``: ``[batch, tokens, width]``, timestep ``[batch]``, context of the same width."""

    def __init__(self, depth: int = 2, width: int = 8, cross: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, cross) for _ in range(depth)])
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, timestep, context)
        return self.proj_out(x)


def transformer(seed: int = 0, **kwargs) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(**kwargs).eval().requires_grad_(False)


def calls(steps: int, seed: int = 3, batch: int = 2, width: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The inputs of one denoising run: ``x`` and a timestep that falls from 900."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, width, generator=generator)
    return [
        (x * (1 - 0.04 * s) + 0.05 * torch.randn(x.shape, generator=generator), torch.full((batch,), 900.0 - 70 * s))
        for s in range(steps)
    ]


class GuidedBlock(Block):
    """``perturbed``: with half of its self-attention, as guidance by a worse model calls it."""

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor | None = None, perturbed: bool = False
    ) -> torch.Tensor:
        if not perturbed:
            return super().forward(x, timestep, context)
        assert self.cross is not None
        x = x + 0.5 * self.attn(self.norm(x)) * torch.cos(timestep / 1000).view(-1, 1, 1)
        x = x + self.cross(x, context)
        return x + self.ff(x)


class Guided(Transformer):
    """A denoiser as guidance calls it: with a prompt's embeddings and a flag, several times per step."""

    def __init__(self, depth: int = 2, width: int = 8) -> None:
        super().__init__(0, width)
        self.blocks = nn.ModuleList([GuidedBlock(width, cross=True) for _ in range(depth)])

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, perturbed: bool = False
    ) -> torch.Tensor:
        for block in self.blocks[:-1]:
            x = block(x, timestep, context, perturbed)
        return self.proj_out(self.blocks[-1](self.between(x), timestep, context, perturbed))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x
