"""What does the work of a command, once its arguments are accepted: imported by the command when it is called."""
