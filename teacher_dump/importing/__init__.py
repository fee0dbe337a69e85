"""Doors in for data that other programs wrote: tokens (tokens.py) and a teacher's targets (targets.py).

A new format is a module here and an entry in a table: token_formats.py, target_formats.py.
"""
