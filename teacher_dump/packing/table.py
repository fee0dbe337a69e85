"""The packing rules. A new one is a file beside this one and an entry here."""

from __future__ import annotations

from collections.abc import Callable

from potstill.teacher_dump.packing.base import Packer, PackerStart
from potstill.teacher_dump.packing.cut import CutPacker
from potstill.teacher_dump.packing.rows import RecordPacker
from potstill.teacher_dump.packing.whole import WholePacker

PACKINGS: dict[str, Callable[[PackerStart], Packer]] = {"cut": CutPacker, "whole": WholePacker, "rows": RecordPacker}
