"""Products with weights that are held as they were stored."""
