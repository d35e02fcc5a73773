"""Answers of a form that was asked for: from a JSON schema to the tokens that may come next."""
