"""Drawings of the pages on models: figures and tables."""
