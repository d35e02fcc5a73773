"""One page about a partitioned model, to be looked at in a browser: self-contained, and as JSON."""
