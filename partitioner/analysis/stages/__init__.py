"""Pipeline stages: which places a model can be cut at, where it is cut, and which stage computes what."""
