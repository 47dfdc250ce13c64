"""Pairs of thin matrices learned on top of frozen weights."""
