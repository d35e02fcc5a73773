"""Rows that ranks write into each other's memory: straight to where they belong, and sums by rows."""
