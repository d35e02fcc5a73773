"""Matrix products of several rows by tensor cores, in captured decode steps."""
