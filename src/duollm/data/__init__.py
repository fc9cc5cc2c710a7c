"""Text in, packed tokens out."""
