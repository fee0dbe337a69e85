"""Array types and limits of targets that every module of this folder may import; it imports none of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]

MAX_ENTRIES_PER_TOKEN = 255
MAX_VOCAB_SIZE = 1 << 24
NO_RANK = 255  # label_rank of a token without a label, and of every rank from here on
STRICT_MASS_EPS = 1e-3
# One grid step is 1/16 nat, so a stored mass may exceed the true one by e^(1/32).
DECODED_MASS_EPS = 0.0324
