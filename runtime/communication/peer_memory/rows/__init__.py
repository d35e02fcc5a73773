"""Collectives of rows over peer memory: rows pushed to where they belong, and sums with a residual and a norm."""
