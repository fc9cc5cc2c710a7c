"""Losses under a policy."""
