"""Statistics of routing: arrays in, arrays out, no torch."""
