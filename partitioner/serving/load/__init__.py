"""Requests as a population of users would send them, and what came of them."""
