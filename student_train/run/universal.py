"""Continue a sharded checkpoint with another number of ranks, through DeepSpeed's universal format.

By hand: python -m potstill.student_train.run.universal RUN/checkpoints/step_NNNNNNNN OUT
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from potstill.common.log import setup_logging
from potstill.common.processes import die_with_parent
from potstill.student_train.run.checkpoint import Checkpoint, ResumeError, read_checkpoint

log = logging.getLogger(__name__)
CONVERT_TIMEOUT_SECONDS = 24 * 3600


def needs_conversion(checkpoint: Checkpoint, world_size: int) -> bool:
    """ZeRO 1-3 files are cut by rank; ZeRO 0 loads on any number of ranks.

    Raises ResumeError where the universal format of DeepSpeed 0.19 does not hold what the optimizer keeps.
    """
    needed = checkpoint.zero_stage > 0 and checkpoint.world_size != world_size
    kind = checkpoint.manifest["pinned"].get("optimizer.kind", "adamw")
    if needed and kind != "adamw":
        raise ResumeError(
            f"{checkpoint.folder} was saved by {checkpoint.world_size} ranks with optimizer.kind {kind} and zero_stage "
            f"{checkpoint.zero_stage}, and now there are {world_size}: DeepSpeed's universal format holds AdamW's "
            f"state only. Resume with {checkpoint.world_size} ranks (with zero_stage 0 any number of ranks can resume)"
        )
    return needed


def universal_folder(checkpoint: Checkpoint) -> Path:
    """Side folder of a checkpoint's universal form."""
    return checkpoint.folder.parent / "universal" / checkpoint.folder.name


def remove_universal_folders(checkpoint: Checkpoint) -> None:
    """Delete the universal forms beside a checkpoint, whole or not: a killed start leaves its own behind."""
    shutil.rmtree(universal_folder(checkpoint).parent, ignore_errors=True)


def convert(checkpoint: Checkpoint, output: Path, *, num_workers: int = 1) -> None:
    """Write the universal form to `output` (whole or not at all). Raises ResumeError with DeepSpeed's own words."""
    if output.exists():
        raise ResumeError(f"{output} exists already; remove it or name another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: a converter that outlives its killed parent must not write into the next attempt's folder.
    part = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    command = [sys.executable, "-m", "potstill.student_train.run.to_universal"]
    command += ["--input_folder", str(checkpoint.folder), "--output_folder", str(part)]
    command += ["--num_extract_workers", str(num_workers), "--num_merge_workers", str(num_workers)]
    if checkpoint.zero_stage < 3:
        command.append("--inject_missing_state")  # ZeRO 1/2 files lack the universal description
    # The converter is no rank of this run, so it must not see the launcher's variables.
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    log.info("converting %s to the universal format: %s", checkpoint.folder, " ".join(command))
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=CONVERT_TIMEOUT_SECONDS,
        check=False,
        preexec_fn=die_with_parent,
    )
    if done.returncode:
        shutil.rmtree(part, ignore_errors=True)  # a disk that it has filled is free again
        raise ResumeError(
            f"the conversion of {checkpoint.folder} failed with exit code {done.returncode}; its last words:\n"
            f"{done.stderr[-2000:]}\nresume with {checkpoint.world_size} ranks instead"
        )
    os.replace(part, output)


def main() -> None:
    """Command line of the conversion."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder step_NNNNNNNN")
    parser.add_argument("output", type=Path, help="folder to create")
    parser.add_argument("--num-workers", type=int, default=1)
    options = parser.parse_args()
    setup_logging()
    try:
        convert(read_checkpoint(options.checkpoint, contents=True), options.output, num_workers=options.num_workers)
    except ResumeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
