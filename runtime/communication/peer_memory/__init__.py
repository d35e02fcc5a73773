"""Collectives of GPUs of one host that can write into each other's memory."""
