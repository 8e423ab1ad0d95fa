"""From requests to an edit, in the paper's order: keys and statistics, targets (Stage I), refinement,
the solve layer by layer.

Imports `scoring`, `language`, `data`, `algebra` and `support`. Read first: `editor.py`.
"""
