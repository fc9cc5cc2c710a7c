"""The oracle: the best route of each token, chosen with the label."""
