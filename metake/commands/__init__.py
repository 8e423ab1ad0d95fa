"""The command line: words and options, sub-commands, the book's pages as commands. Each calls one library function.

Imports every room, most of them only when a command needs them. Read first: `cli.py`.
"""
