"""Tools that an answer may call: how the model's own template writes a call, and calls read from what was written."""
