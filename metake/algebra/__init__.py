"""An edit as algebra, Δ = R·M: metrics on key space, the gate and the solve, updates and what is made of them.

Tensors in, tensors out; torch only, no model. Imports `support`. Read first: `solve.py`.
"""
