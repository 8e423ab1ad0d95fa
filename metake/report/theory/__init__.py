"""Drawings of the pages on the paper's statements."""
