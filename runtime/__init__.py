"""Runs one rank. Users import `runtime.engine`."""
