"""Text in and out: chat templates, and tokens decoded as they come."""
