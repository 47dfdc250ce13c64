"""Learners of streams that are met once: every sample is observed, in closed form."""
