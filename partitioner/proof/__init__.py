"""Static checks before anything runs, and comparing in float64."""
