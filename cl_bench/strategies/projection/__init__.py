"""Updates kept out of the subspaces that old tasks use."""
