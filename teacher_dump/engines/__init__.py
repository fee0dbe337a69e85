"""Engines: ways to run a teacher over rows. A new engine is one file and one line in ENGINES."""

from __future__ import annotations

from importlib import import_module

from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.base import Head, TeacherEngine, TeacherOutput

__all__ = ["ENGINES", "Head", "TeacherEngine", "TeacherOutput", "load_engine"]

# Name in the configuration -> module below this folder that holds `load(teacher) -> TeacherEngine`.
ENGINES = {"hf": "hf", "ensemble": "ensemble", "zero3": "zero3"}


def load_engine(teacher: TeacherConfig) -> TeacherEngine:
    """Load the teacher's weights and return its engine, ready to run. Raises UserError."""
    name = "ensemble" if teacher.ensemble else teacher.engine
    module = import_module(f"potstill.teacher_dump.engines.{ENGINES[name]}")
    engine: TeacherEngine = module.load(teacher)
    return engine
