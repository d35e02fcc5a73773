"""What of other sequences a sequence may take over: equal prefixes, in blocks and in rows."""
