"""A checkpoint folder becomes a model without data, and a note of where each weight lies in the folder's files."""
