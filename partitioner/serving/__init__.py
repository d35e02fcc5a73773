"""Serving a model to many requests: from Python (`launch`), and over HTTP."""
