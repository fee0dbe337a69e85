"""Engines: ways to run a teacher over rows. A new one is a module here and an entry in table.py."""
