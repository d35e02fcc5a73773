"""What a user reads about a partitioned model: what was split, what is replicated and why, bytes, collectives."""
