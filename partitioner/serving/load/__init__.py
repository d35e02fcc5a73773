"""A load generator: requests as many users would send them, and the times measured."""
