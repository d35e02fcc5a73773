"""The files of a bundle: their schema, written and read as data that may be hostile."""
