"""A vision transformer small enough to be trained on a CPU."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cl_bench.contracts import UsageError
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count
from cl_bench.models.pooling import Pool, Pooling


class Block(nn.Module):
    """Attention and an MLP, each on normalised inputs and added to them."""

    branch = ("norm2", "down")
    """What reads the hidden states that the MLP's result is added to, and what gives it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, L, width) to the same."""
        n, length, width = x.shape
        normed = self.norm1(x)
        q, k, v = (
            part(normed).view(n, length, self.heads, -1).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.out(read.reshape(n, length, width))
        return torch.add(x, self.down(F.gelu(self.up(self.norm2(x)))))


@checked("model.")
class ViT(nn.Module):
    """Features (n, width) of images, from patches and a token for the whole.

    Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021, at any size, weights drawn from
    torch's global generator.

    Args:
        input_shape: (channels, height, width); patches must tile it.
        patch: side of a patch.
        depth: blocks.
        width: of a position's vector.
        heads: attention heads of a block; must divide the width.
        pooling: ``cls`` (the token for the whole), ``mean`` over all positions, or ``last``.
    """

    trained_on: str | None = None

    def __init__(
        self,
        input_shape: Sequence[int],
        patch: Count = 4,
        depth: Count = 4,
        width: Count = 96,
        heads: Count = 4,
        pooling: Pooling = "cls",
    ) -> None:
        super().__init__()
        if len(input_shape) != 3 or any(side % patch for side in input_shape[1:]):
            raise UsageError(
                f"model.patch={patch}: patches must tile (channels, height, width) images, these "
                f"are {tuple(input_shape)}"
            )
        if width % heads:
            raise UsageError(f"model.heads={heads}: must divide model.width={width}")
        self.pool = Pool(pooling)
        self.patches = nn.Conv2d(input_shape[0], width, patch, stride=patch)
        count = (input_shape[1] // patch) * (input_shape[2] // patch) + 1
        self.whole = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, count, width))
        self.body = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def blocks(self) -> list[nn.Module]:
        """Patches, the blocks, the last normalisation."""
        return [self.patches, *self.body, self.norm]

    def forward(self, x: Tensor) -> Tensor:
        """Features of images (n, *input_shape)."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.whole.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.body:
            x = block(x)
        x = self.norm(x)
        held = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        features: Tensor = self.pool(x, held)
        return features
