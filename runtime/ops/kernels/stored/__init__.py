"""Matrix products with quantised weights as they are stored: codes and scales."""
