"""Requests and the cases that test them: their types, their files, and the facts, texts and numbers that ship with the
package.

No tensor and no model. Imports `support`. Read first: `requests.py`.
"""
