"""Tensors that files hold as codes and scales: how they are described, read by parts, and turned into numbers."""
