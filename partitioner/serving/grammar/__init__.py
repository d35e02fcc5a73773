"""Structured answers: from a JSON schema to a grammar that constrains tokens."""
