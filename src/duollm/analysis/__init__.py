"""Turns the records of a study into results.json. No torch."""
