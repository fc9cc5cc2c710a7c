"""Figures and the page: from results.json and the oracle's files, no torch."""
