"""`partitioner bench`: a server under load, a plan on this machine."""
