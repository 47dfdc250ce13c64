"""Two processes that share the weights out: neither ever holds more of them than a block."""

import pytest
from held import DEPTH, STRATEGIES


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_no_process_holds_more_than_a_block_beyond_what_it_owns(pair, name):
    for seen in pair(f"held:held:{name}"):
        found, block, outside = seen["found"], seen["block"], seen["outside"]
        assert found["blocks"] == 1
        # Weights and gradients of a block and of what lies outside of blocks; of a matrix that it
        # owns a process has W_0, the last change, and for a step the gradient and the new weight.
        most = 2 * (block + outside) + 4 * seen["owned"]
        assert block <= found["whole"] <= most, seen
        together = seen["together"]  # and the walk would have seen a whole network
        assert together["blocks"] == DEPTH
        assert together["whole"] >= DEPTH * block
