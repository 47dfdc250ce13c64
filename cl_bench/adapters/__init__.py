"""Adapters in place of a network's weights: PEFT's by their configurations, and what PEFT lacks."""

from cl_bench.adapters.abba import ABBA
from cl_bench.adapters.adapted import Adapted
from cl_bench.adapters.adapter import Adapter
from cl_bench.adapters.attached import Attached
from cl_bench.adapters.fish import FISH
from cl_bench.adapters.frozen_a import FrozenA
from cl_bench.adapters.loldu import LoLDU
from cl_bench.adapters.lora_xs import LoRAXS
from cl_bench.adapters.mora import MoRA
from cl_bench.adapters.reparametrised import Reparametrisation, Reparametrised
from cl_bench.adapters.spectral import Spectral
from cl_bench.adapters.svft import SVFT

__all__ = [
    "ABBA",
    "FISH",
    "SVFT",
    "Adapted",
    "Adapter",
    "Attached",
    "FrozenA",
    "LoLDU",
    "LoRAXS",
    "MoRA",
    "Reparametrisation",
    "Reparametrised",
    "Spectral",
]
