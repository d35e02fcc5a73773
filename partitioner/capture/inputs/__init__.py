"""What the graph takes as inputs: tokens, positions, masks; and rotary embeddings that depend on lengths."""
