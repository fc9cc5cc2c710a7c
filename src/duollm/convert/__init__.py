"""Dense checkpoints become duos; duos are saved and loaded as Hugging Face folders."""
