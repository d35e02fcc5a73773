"""What the launcher starts once per rank, for the commands that start any."""
