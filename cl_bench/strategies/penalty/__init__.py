"""Changes that cost: a term in the loss pulls at weights that old tasks need."""
