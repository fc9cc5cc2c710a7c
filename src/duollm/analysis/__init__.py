"""Quantities of a study: records in, results.json out. No torch."""
