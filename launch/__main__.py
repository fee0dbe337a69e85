"""`python -m potstill.launch` is `potstill`, for a checkout that is used without an install."""

import sys

from potstill.launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
