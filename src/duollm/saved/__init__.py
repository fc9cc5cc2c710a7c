"""One saved model without a study: its losses on text, lm-eval tasks, and text that it generates."""
