"""Parquet and Arrow files, and folders of save_to_disk: which files there are, and their records."""
