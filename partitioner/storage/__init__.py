"""Models as files: checkpoints of transformers, bundles of ours, and MODEL on the command line."""
