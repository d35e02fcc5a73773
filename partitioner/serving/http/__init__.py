"""The HTTP server: routes, limits, keys, health, metrics, shutdown."""
