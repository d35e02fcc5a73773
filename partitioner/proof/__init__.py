"""What is checked before anything runs, and the means to compare in float64."""
