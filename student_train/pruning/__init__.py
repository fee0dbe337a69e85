"""Pruned starts: a student begins with a part of its teacher's weights (Minitron, arXiv 2407.14679, 2408.11796)."""
