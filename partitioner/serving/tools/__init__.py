"""Tool calls: the form in which a model's chat template writes them, and reading them from its text."""
