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
from potstill.storage.joining import JoinedRow, RowDataset, RowSample, check_joined
from potstill.storage.k_bound import KBound, bound_positions
from potstill.storage.loader import LoadedBatch, Loader
from potstill.storage.order import ORDER_VERSION, RowOrder, permute
from potstill.storage.paths import StorePath
from potstill.storage.plan import EpochPlan, RowPlan
from potstill.storage.reader import StoreReader
from potstill.storage.rows import NO_LABEL, Row, ScoresRow, TargetsRow, TokensRow, token_digest
from potstill.storage.seal import Manifest, seal_store
from potstill.storage.self_check import AlignmentReport, check_alignment, check_student
from potstill.storage.sparse_targets import Candidates, SparseTargets, concatenate
from potstill.storage.spec import RunSpec
from potstill.storage.stats import StoreStats, store_stats
from potstill.storage.status import StoreStatus, store_status
from potstill.storage.verify import VerifyReport, verify_store
from potstill.storage.writer import StoreWriter, check_output, discard_unused

__all__ = [
    "NO_LABEL",
    "ORDER_VERSION",
    "AlignmentReport",
    "Candidates",
    "CommitRecord",
    "CorruptError",
    "EpochPlan",
    "GaveUpError",
    "GcReport",
    "IdMap",
    "JoinedRow",
    "KBound",
    "LoadedBatch",
    "Loader",
    "Manifest",
    "MismatchError",
    "NotAStoreError",
    "ReadFailedError",
    "Row",
    "RowDataset",
    "RowOrder",
    "RowPlan",
    "RowSample",
    "RunSpec",
    "ScoresRow",
    "SparseTargets",
    "StoreError",
    "StoreExistsError",
    "StorePath",
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
    "check_joined",
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
