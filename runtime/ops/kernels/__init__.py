"""Kernels of GPUs, such as torch's flash attention and one of ours in Triton, and of CPUs."""
