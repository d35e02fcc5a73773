"""Modules that the launcher runs once per rank, for the commands that start ranks."""
