"""The fast path of tiny networks: several batches at once, and short optimizer steps.

What is here is all that the rest sees of it: :class:`Packs` says how batches are handed out and
what that means for Lightning's loop, :func:`learn_pack` learns one of them, :class:`ShortSteps` is
for loops of one's own, and :func:`check_packs` refuses what such loops cannot do.
"""

from cl_bench.packed.checks import check_packs
from cl_bench.packed.packs import Packs
from cl_bench.packed.training import ShortSteps, learn_pack

__all__ = ["Packs", "ShortSteps", "check_packs", "learn_pack"]
