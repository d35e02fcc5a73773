"""Steps of single tokens from fixed memory, captured and replayed: of a whole model, and of one stage of it."""
