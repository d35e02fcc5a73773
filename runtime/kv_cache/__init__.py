"""What a rank keeps between runs, and the memory for it."""
