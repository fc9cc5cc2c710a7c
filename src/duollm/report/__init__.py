"""Draws the figures and writes the page from results.json and the oracle's files. No torch."""
