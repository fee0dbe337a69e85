"""Fresh-process half of the export check: load a folder, compare its logits with the probe, print the difference."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

# Same weights, same arithmetic; only the order of a sum inside a matrix product may differ.
TOLERANCE = 1e-5


def main(folder: Path, probe: Path) -> int:
    """Print the largest difference; returns 1 when it is more than rounding."""
    from transformers import AutoModelForCausalLM

    from potstill.student_train.hf_export.hf_folder import probe_logits

    expected = torch.load(probe, weights_only=True)
    found = probe_logits(
        AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, trust_remote_code=False, dtype="auto")
    )
    difference = float((found - expected).abs().max())
    sys.stdout.write(f"{difference}\n")
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        sys.stderr.write(f"logits differ by {difference}, more than rounding\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
