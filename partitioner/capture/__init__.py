"""Capture: a Hugging Face model becomes one graph."""

from partitioner.capture.capture import capture
from partitioner.capture.steps.capture_step import capture_piece, capture_step, states_found_once

__all__ = ["capture", "capture_piece", "capture_step", "states_found_once"]
