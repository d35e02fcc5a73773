"""Continuing sequences on one rank: requests, options, the loop, and decode steps captured once."""
