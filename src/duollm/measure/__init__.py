"""Measures policies: losses, routes, FLOPs and time of text under any policy."""
