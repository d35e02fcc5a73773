"""How the ranks of process groups meet, and what they tell each other beside their tensors."""
