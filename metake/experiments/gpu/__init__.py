"""The first hour on a GPU: what is measured there, in the order of its value, within a box of time. See `parts`."""
