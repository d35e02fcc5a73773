"""Kernels for GPUs (Triton, torch) and for CPUs."""
