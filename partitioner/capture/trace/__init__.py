"""One run of torch.export, and the rewriting of its result to a graph of plain ops."""
