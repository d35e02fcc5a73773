"""Prefix caching: tokens that a sequence takes over from others, in blocks and in rows."""
