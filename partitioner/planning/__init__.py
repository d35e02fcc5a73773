"""Choosing a plan: clusters, predicted prices of plans, and the search among them."""
