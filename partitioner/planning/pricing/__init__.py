"""What a plan costs on a cluster: time per step, and what binds."""
