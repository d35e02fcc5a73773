"""What torch.export does beside a trace and nothing here reads, or does again and again: left out while one is made."""
