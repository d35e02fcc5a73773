"""Loading a rank's shard of the weights, from memory or from files."""
