"""The gradient family: edits computed from the inputs and output gradients of linear maps (UltraEdit, MALMEN, MEND,
SMEdit), by the same solver and into the same `Edit`. Read first: `editor.py`.
"""
