"""metake: knowledge editing in one formula, and the reproducibility companion of MetaKE (arXiv 2603.12677)."""

__version__ = "0.1.0"
