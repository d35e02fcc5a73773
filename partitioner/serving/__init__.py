"""A model served: many requests, over Python and over HTTP."""
