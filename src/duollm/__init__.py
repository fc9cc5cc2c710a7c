"""duollm: study adaptive computation in language models."""
