"""Updates kept out of what the weights themselves hold strongest."""
