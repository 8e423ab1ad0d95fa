"""What an edited model is asked: probes of the edited facts, free text, and how an answer to a task is read.

Imports `language`, `data` and `support`; knows no editor. Read first: `evaluation.py`.
"""
