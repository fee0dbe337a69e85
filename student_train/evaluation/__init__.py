"""Figures and texts of a student on held-out rows."""
