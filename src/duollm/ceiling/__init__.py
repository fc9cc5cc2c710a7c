"""The predictable ceiling: how well an offline predictor of gains chooses routes without labels."""
