"""The machine at hand: its memory and links, its kernels, and what its host needs beside them."""
