"""Routers: one file per kind, with its training."""
