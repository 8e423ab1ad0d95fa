"""One language model at hand: loading, text to tokens, reading and injecting activations, beginnings, sampling.

Imports `data`, `algebra` and `support`. Read first: `model.py`.
"""
