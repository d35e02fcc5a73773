"""Continuing sequences over pipeline stages."""
