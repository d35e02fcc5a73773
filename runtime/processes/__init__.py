"""Processes of ranks: starting them, how they find each other, and which of them are still there."""
