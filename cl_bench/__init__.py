"""Continual learning experiments: which update rule learns new tasks without losing old ones."""

__version__ = "0.1.0"
