"""One language model at hand: loading it, text to tokens, reading and injecting activations, shared beginnings,
sampling.

Imports `data`, `algebra` and `support`. Read first: `model.py`.
"""
