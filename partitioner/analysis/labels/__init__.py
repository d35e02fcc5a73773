"""Which weight indices must stay together, and which rank owns which of them."""
