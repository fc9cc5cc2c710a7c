"""Converts dense checkpoints to duos; saves and loads duos as Hugging Face folders."""
