"""DeepSpeed's converter to the universal format, in a process in which loading executes nothing (unpickling.py).

Takes the arguments of deepspeed.checkpoint.ds_to_universal.
"""

from __future__ import annotations

import multiprocessing
import runpy
import sys
from pathlib import Path

from potstill.student_train.run.unpickling import only_allowed


def main() -> None:
    """Run the converter with this process's arguments."""
    folder = Path(sys.argv[sys.argv.index("--input_folder") + 1])
    multiprocessing.set_start_method("fork")  # its workers load too, and must inherit the limit
    with only_allowed(folder):
        runpy.run_module("deepspeed.checkpoint.ds_to_universal", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
