"""Routers: one file per kind, its training included."""
