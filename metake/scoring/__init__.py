"""What an edited model is asked: probes of the edited facts, free text, tasks that no edit should touch.

Imports `language`, `data` and `support`; knows no editor. Read first: `evaluation.py`.
"""
