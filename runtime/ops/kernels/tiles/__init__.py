"""Products of several rows of x, by tiles of the weight."""
