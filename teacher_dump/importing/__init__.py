"""Doors in for data that other programs wrote: tokens (tokens/) and a teacher's targets (targets/).

Both read Parquet and Arrow files by tables/. A new format is a module in one of the two and an entry in its formats.py.
"""
