"""One saved model without a study: its losses on text, lm-eval tasks, and text that it generates.

Every verb raises UserError, one line long, for bad input.
"""
