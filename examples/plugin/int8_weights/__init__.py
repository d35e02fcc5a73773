"""The weights of linears as int8: see `int8_weights.int8_weights`."""
