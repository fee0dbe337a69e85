"""Looks at the links of the package before anything is built; what is built stands in pyproject.toml."""

from pathlib import Path

from setuptools import setup

PACKAGE = Path(__file__).resolve().parent / "src" / "potstill"
ROOMS = ("common", "kernels", "launch", "storage", "student_train", "teacher_dump")


def check_links() -> None:
    """Raise SystemExit where a room is no folder. A checkout without symbolic links (Windows) has text files in their
    place, from which a package without any code would be built without an error."""
    broken = [room for room in ROOMS if not (PACKAGE / room).is_dir()]
    if broken:
        found = "text files" if all((PACKAGE / room).is_file() for room in broken) else "missing"
        raise SystemExit(
            f"{PACKAGE}: {', '.join(broken)} are {found}; expected links to the folders of these names in the root of "
            "the repository. This checkout was made without symbolic links: allow them (on Windows developer mode, "
            "and `git config core.symlinks true`), then `git checkout -- src/potstill`, and build again"
        )


check_links()
setup()
