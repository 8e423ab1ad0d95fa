"""One function per figure or table of the book: parameters in, tidy records (a DataFrame) out. No drawing here.

`theory/` checks statements, `studies/` makes figures and tables, `speed/` times; on top of them runs on disk and what
pages share.
Imports every room but `commands`; of `report` only what reads and writes records. Read first: `runs.py`.
"""
