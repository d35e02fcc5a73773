"""How the ranks of process groups connect, and small messages that they exchange beside tensors."""
