"""Attention by kernels of GPUs: torch's flash kernel, and one of ours in Triton."""
