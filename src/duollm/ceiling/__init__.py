"""The predictable ceiling: how much routes gain that an offline predictor chooses without labels."""
