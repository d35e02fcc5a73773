"""The likeliest token of each row, by kernels: what captured steps choose."""
