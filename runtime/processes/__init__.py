"""Processes of ranks: starting them, how they find each other, and noticing which are lost."""
