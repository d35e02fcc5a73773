"""Many requests at once: which of them run in each step, where in the cache they lie, and their next tokens."""
