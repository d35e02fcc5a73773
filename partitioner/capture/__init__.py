"""Capture: a Hugging Face model becomes one graph."""

from partitioner.capture.model import capture
from partitioner.capture.step import capture_step

__all__ = ["capture", "capture_step"]
