"""The two-block transformer of the tutorial: small enough that its whole graph can be read."""

import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return self.out(scaled_dot_product_attention(q, k, v)[:, 0])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation, self.norm = nn.Linear(width, 3 * width), nn.LayerNorm(width, elementwise_affine=False)
        self.attn, self.mlp = Attention(width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = self.modulation(time).chunk(3, -1)
        x = x + gate * self.attn(self.norm(x) * (1 + scale) + shift)
        return x + gelu(self.mlp(x))


class TwoBlocks(nn.Module):
    """``x [batch, tokens, width]``, ``timestep [batch]``, ``text [batch, words, width]`` -> like ``x``."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.time, self.text = nn.Linear(1, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        time = self.time(timestep[:, None, None] / 1000)
        x = x + self.text(text).mean(1, keepdim=True)
        for block in self.blocks:
            x = block(x, time)
        return x


def make() -> tuple[TwoBlocks, dict[str, torch.Tensor]]:
    """The model and the inputs of one call: ``cachepass explain examples/two_blocks.py:make``."""
    torch.manual_seed(0)
    inputs = {"x": torch.randn(1, 4, 8), "timestep": torch.tensor([900.0]), "text": torch.randn(1, 3, 8)}
    return TwoBlocks().eval().requires_grad_(False), inputs
