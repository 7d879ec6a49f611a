"""A small vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929): pre-norm blocks over square patches.

Patches are 8 pixels wide, 4 on images smaller than 64, so that the sequence neither explodes nor vanishes. The
embedding is read from the mean of the patches; there is no class token.
"""

import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 384
DEPTH = 12
HEADS = 6


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
        )

    def forward(self, x_BTE: torch.Tensor) -> torch.Tensor:
        qkv_BT3E = self.query_key_value(self.attention_norm(x_BTE))
        q_BHTK, k_BHTK, v_BHTK = (
            part_BTE.unflatten(2, (self.heads, -1)).transpose(1, 2) for part_BTE in qkv_BT3E.chunk(3, dim=2)
        )
        mixed_BTE = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK).transpose(1, 2).flatten(2)
        x_BTE = x_BTE + self.attention_output(mixed_BTE)
        y_BTE: torch.Tensor = x_BTE + self.mlp(x_BTE)
        return y_BTE


class VisionTransformer(nn.Module):
    """Axes: T patches, E = 384 features. Images are padded on the right and below to whole patches.

    Args: as of the convolutional networks, but for the dropout, which is inside the blocks.
    """

    def __init__(self, channels: int, height: int, width: int, dimension: int, dropout: float) -> None:
        super().__init__()
        patch = 8 if min(height, width) >= 64 else 4
        self.padding = (0, -width % patch, 0, -height % patch)
        tokens = -(-height // patch) * -(-width // patch)
        self.patches = nn.Conv2d(channels, WIDTH, patch, patch)
        self.positions_TE = nn.Parameter(torch.empty(tokens, WIDTH))
        nn.init.trunc_normal_(self.positions_TE, std=0.02)
        self.blocks = nn.Sequential(*(Block(WIDTH, HEADS, dropout) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.output = nn.Sequential(nn.Linear(WIDTH, dimension, bias=False), nn.BatchNorm1d(dimension))

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        x_BTE = self.patches(F.pad(images_BCHW, self.padding)).flatten(2).transpose(1, 2) + self.positions_TE
        x_BD: torch.Tensor = self.output(self.norm(self.blocks(x_BTE)).mean(dim=1))
        return x_BD
