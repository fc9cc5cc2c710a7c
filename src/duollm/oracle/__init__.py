"""Exact search over all routes, with the label in hand."""
