"""Arithmetic on the weights that tasks lead to."""
