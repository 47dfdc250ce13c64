"""What is put into transformer blocks: prompts for their attention, adapters beside their MLPs."""

from cl_bench.blocks.attention import FurtherKeys, require_attention
from cl_bench.blocks.block import Block, blocks_of
from cl_bench.blocks.parallel import Bottleneck, Bottlenecks
from cl_bench.blocks.prompted import Prompted, Prompts, pool_of

__all__ = [
    "Block",
    "Bottleneck",
    "Bottlenecks",
    "FurtherKeys",
    "Prompted",
    "Prompts",
    "blocks_of",
    "pool_of",
    "require_attention",
]
