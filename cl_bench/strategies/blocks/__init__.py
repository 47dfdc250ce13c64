"""Prompts and adapters inside the blocks of a transformer whose weights stay as they are."""
