"""Kernels in Triton for one new token per row, over a cache: of keys and values, or of the latent they are made of."""
