"""Work that torch.export does beside a trace: what nothing here reads is left out, what repeats is done once."""
