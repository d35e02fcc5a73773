"""The KV cache of a rank and its recurrent states, and the memory for them."""
