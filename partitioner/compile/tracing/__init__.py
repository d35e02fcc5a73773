"""Models as canonical programs before any pass, and whether their ways to run say the same."""
