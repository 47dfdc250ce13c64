"""Strategies whose server acts on what clients send."""
