"""The transformer layers of the YOLOv5 zoo (C3TR), with the sub-module names that its checkpoints use."""

from __future__ import annotations

from torch import Tensor, nn

from models.blocks import C3, Conv
from models.registry import layer

HEADS = 4


class TransformerLayer(nn.Module):
    """Self-attention and a linear pair, each with a residual and without normalization; [L, B, C] to the same shape."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.q = nn.Linear(channels, channels, bias=False)
        self.k = nn.Linear(channels, channels, bias=False)
        self.v = nn.Linear(channels, channels, bias=False)
        self.ma = nn.MultiheadAttention(channels, heads)
        self.fc1 = nn.Linear(channels, channels, bias=False)
        self.fc2 = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ma(self.q(x), self.k(x), self.v(x), need_weights=False)[0]
        return x + self.fc2(self.fc1(x))


class TransformerBlock(nn.Module):
    """Transformer layers over the positions of a map, with a learned linear map as position code."""

    def __init__(self, c_in: int, c_out: int, heads: int, n: int) -> None:
        super().__init__()
        self.conv = Conv(c_in, c_out, 1) if c_in != c_out else None
        self.linear = nn.Linear(c_out, c_out)
        self.tr = nn.Sequential(*(TransformerLayer(c_out, heads) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            x = self.conv(x)
        b, c, h, w = x.shape
        tokens = x.flatten(2).permute(2, 0, 1)
        tokens = self.tr(tokens + self.linear(tokens))
        return tokens.permute(1, 2, 0).reshape(b, c, h, w)


@layer(repeats=True)
class C3TR(C3):
    """C3 with a transformer block."""

    def inner(self, hidden: int, n: int, shortcut: bool, g: int) -> nn.Module:
        return TransformerBlock(hidden, hidden, HEADS, n)
