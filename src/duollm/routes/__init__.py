"""Routes: their ids, and random ones."""
