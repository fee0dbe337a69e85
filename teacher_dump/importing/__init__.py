"""Doors in for data that other programs wrote: tokens (tokens/) and a teacher's targets (targets/).

Both find and read Parquet and Arrow files by tables/. A new format is a module in tokens/ or targets/ and an entry in
the formats.py beside it.
"""
