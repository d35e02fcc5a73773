"""Capture: a Hugging Face model becomes one graph."""

from partitioner.capture.model import capture

__all__ = ["capture"]
