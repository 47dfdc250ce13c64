"""Heads in closed form on the features of a network that is not trained."""
