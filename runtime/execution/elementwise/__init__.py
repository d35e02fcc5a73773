"""What several ops in a row do element by element, as one kernel on a GPU."""
