"""What several commands have in common: options, how errors are told, what a compile is doing."""
