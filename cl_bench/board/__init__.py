"""The board: declared protocols, a cell for each method on each, results that anyone can run again.

Protocols are data (``conf/board``), cells are data (``docs/results/board``): every run's
``results.jsonl``, compressed, with its hash, command, commit, seed, order and cost.
"""
