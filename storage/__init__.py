"""Stores of tokens, teacher targets and scores: write once, verify, read in any order.

The format is described in docs/format.md; this facade is the only thing other rooms import.
"""

from potstill.storage.commit import CommitRecord
from potstill.storage.errors import (
    CorruptError,
    GaveUpError,
    MismatchError,
    NotAStoreError,
    ReadFailedError,
    StoreError,
    StoreExistsError,
    UnsealedError,
    VersionError,
    WriteFailedError,
)
from potstill.storage.gc import GcReport, collect_garbage
from potstill.storage.id_map import IdMap
from potstill.storage.inspect import format_row
from potstill.storage.k_bound import KBound, bound_positions
from potstill.storage.loader import LoadedBatch, Loader
from potstill.storage.order import ORDER_VERSION, RowOrder, permute
from potstill.storage.plan import EpochPlan, RowPlan
from potstill.storage.reader import StoreReader
from potstill.storage.rows import Row, ScoresRow, TargetsRow, TokensRow, token_digest
from potstill.storage.seal import Manifest, seal_store
from potstill.storage.self_check import AlignmentReport, check_alignment, check_student
from potstill.storage.sparse_targets import SparseTargets, concatenate
from potstill.storage.spec import RunSpec
from potstill.storage.stats import StoreStats, store_stats
from potstill.storage.status import StoreStatus, store_status
from potstill.storage.verify import VerifyReport, verify_store
from potstill.storage.writer import StoreWriter, check_output, discard_unused

__all__ = [
    "ORDER_VERSION",
    "AlignmentReport",
    "CommitRecord",
    "CorruptError",
    "EpochPlan",
    "GaveUpError",
    "GcReport",
    "IdMap",
    "KBound",
    "LoadedBatch",
    "Loader",
    "Manifest",
    "MismatchError",
    "NotAStoreError",
    "ReadFailedError",
    "Row",
    "RowOrder",
    "RowPlan",
    "RunSpec",
    "ScoresRow",
    "SparseTargets",
    "StoreError",
    "StoreExistsError",
    "StoreReader",
    "StoreStats",
    "StoreStatus",
    "StoreWriter",
    "TargetsRow",
    "TokensRow",
    "UnsealedError",
    "VerifyReport",
    "VersionError",
    "WriteFailedError",
    "bound_positions",
    "check_alignment",
    "check_output",
    "check_student",
    "collect_garbage",
    "concatenate",
    "discard_unused",
    "format_row",
    "permute",
    "seal_store",
    "store_stats",
    "store_status",
    "token_digest",
    "verify_store",
]
