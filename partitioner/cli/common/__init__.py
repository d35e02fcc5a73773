"""What several commands share: options, error messages, progress."""
