"""Stores of tokens, teacher targets and scores: write once, verify, read in any order.

The format is described in docs/format.md; this facade is the only thing other rooms import.
"""

from potstill.storage.errors import (
    CorruptError,
    GaveUpError,
    HungReadError,
    MismatchError,
    NotAStoreError,
    ReadFailedError,
    StoppedReadError,
    StoreError,
    StoreExistsError,
    UnsealedError,
    VersionError,
    WriteFailedError,
)
from potstill.storage.files.commit import CommitRecord
from potstill.storage.files.folder import StorePath
from potstill.storage.files.node_folder import NodeFolder, default_node_root
from potstill.storage.files.prefetch import Prefetcher
from potstill.storage.files.shared_arrays import Add, SharedArrays, shared_arrays, shared_from, shared_note
from potstill.storage.files.waiting import give_up_reads, stuck_read
from potstill.storage.loading.joining import JoinedRow, RowDataset, RowSample, check_joined
from potstill.storage.loading.loader import LoadedBatch, Loader
from potstill.storage.loading.mixture import (
    MIXTURE_VERSION,
    Draw,
    MixedOrder,
    Mixture,
    source_seed,
    whole_weights,
)
from potstill.storage.loading.mixture_plan import MixturePlan
from potstill.storage.loading.order import ORDER_VERSION, RowOrder, permute
from potstill.storage.loading.row_plan import EpochPlan, RowPlan
from potstill.storage.loading.sources import Source, SourceRows
from potstill.storage.rows.alignment import check_row_alignment
from potstill.storage.rows.column import Column
from potstill.storage.rows.columns import COLUMNS
from potstill.storage.rows.first_choices import FirstChoices
from potstill.storage.rows.id_map import IdMap
from potstill.storage.rows.k_bound import KBound, bound_positions
from potstill.storage.rows.only_rows import HELD, held_mask, only_rows_field
from potstill.storage.rows.row_types import NO_LABEL, Row, ScoresRow, TargetsRow, TokensRow, token_digest
from potstill.storage.rows.scores_columns import SCORES_COLUMNS, ScoresColumn
from potstill.storage.rows.sparse_targets import Candidates, SparseTargets, concatenate
from potstill.storage.rows.tokens_columns import TOKENS_COLUMNS, TokensColumn
from potstill.storage.rows.vocabulary import VocabularyMap, dropped_mass
from potstill.storage.store.card import write_card
from potstill.storage.store.gc import GcReport, collect_garbage
from potstill.storage.store.held_rows import held_rows, missing_text
from potstill.storage.store.inspect import format_row
from potstill.storage.store.reader import StoreReader
from potstill.storage.store.repair import RepairReport, repair_store
from potstill.storage.store.seal import Manifest, check_sealed, seal_store
from potstill.storage.store.self_check import AlignmentReport, check_alignment, check_places, check_student
from potstill.storage.store.signing import check_key, sign_store, signature_findings
from potstill.storage.store.spec import RunSpec
from potstill.storage.store.stats import StoreStats, store_stats
from potstill.storage.store.status import StoreStatus, store_status
from potstill.storage.store.verify import VerifyReport, rows_to_verify, verify_store
from potstill.storage.store.writer import StoreWriter, check_output, discard_store, discard_unused, read_spec

__all__ = [
    "COLUMNS",
    "HELD",
    "MIXTURE_VERSION",
    "NO_LABEL",
    "ORDER_VERSION",
    "SCORES_COLUMNS",
    "TOKENS_COLUMNS",
    "Add",
    "AlignmentReport",
    "Candidates",
    "Column",
    "CommitRecord",
    "CorruptError",
    "Draw",
    "EpochPlan",
    "FirstChoices",
    "GaveUpError",
    "GcReport",
    "HungReadError",
    "IdMap",
    "JoinedRow",
    "KBound",
    "LoadedBatch",
    "Loader",
    "Manifest",
    "MismatchError",
    "MixedOrder",
    "Mixture",
    "MixturePlan",
    "NodeFolder",
    "NotAStoreError",
    "Prefetcher",
    "ReadFailedError",
    "RepairReport",
    "Row",
    "RowDataset",
    "RowOrder",
    "RowPlan",
    "RowSample",
    "RunSpec",
    "ScoresColumn",
    "ScoresRow",
    "SharedArrays",
    "Source",
    "SourceRows",
    "SparseTargets",
    "StoppedReadError",
    "StoreError",
    "StoreExistsError",
    "StorePath",
    "StoreReader",
    "StoreStats",
    "StoreStatus",
    "StoreWriter",
    "TargetsRow",
    "TokensColumn",
    "TokensRow",
    "UnsealedError",
    "VerifyReport",
    "VersionError",
    "VocabularyMap",
    "WriteFailedError",
    "bound_positions",
    "check_alignment",
    "check_joined",
    "check_key",
    "check_output",
    "check_places",
    "check_row_alignment",
    "check_sealed",
    "check_student",
    "collect_garbage",
    "concatenate",
    "default_node_root",
    "discard_store",
    "discard_unused",
    "dropped_mass",
    "format_row",
    "give_up_reads",
    "held_mask",
    "held_rows",
    "missing_text",
    "only_rows_field",
    "permute",
    "read_spec",
    "repair_store",
    "rows_to_verify",
    "seal_store",
    "shared_arrays",
    "shared_from",
    "shared_note",
    "sign_store",
    "signature_findings",
    "source_seed",
    "store_stats",
    "store_status",
    "stuck_read",
    "token_digest",
    "verify_store",
    "whole_weights",
    "write_card",
]
