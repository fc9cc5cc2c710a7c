"""What was measured: files in, sums per document out, and their bootstrap. No torch."""
