"""Edits from the inputs and output gradients of linear maps: UltraEdit, MALMEN, MEND, SMEdit. First: `editor.py`."""
