"""C++ for CPUs, compiled on the user's machine: what compiles it and keeps it, and products of few rows."""
