"""Text in and out of the commands: a chat as its template writes it, answers as they come."""
