"""The server: routes, limits, keys, health, metrics, its end."""
