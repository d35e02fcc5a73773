"""What one rank runs, as a description."""
