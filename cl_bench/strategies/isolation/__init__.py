"""Weights that later tasks may not change at all."""
