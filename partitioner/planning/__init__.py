"""What do I have, what fits, which plan, and how sure: clusters, prices of plans, and the search among them."""
