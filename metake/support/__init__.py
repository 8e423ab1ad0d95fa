"""What every room stands on: the project's errors, files written all or nothing, the device at hand, progress bars.

Imports nothing of this package. Read first: `errors.py`.
"""
