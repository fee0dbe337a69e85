"""verify_store: check a store as far as asked, from sizes and checksums down to every decoded row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from potstill.storage.files.commit import list_records
from potstill.storage.files.folder import StorePath
from potstill.storage.files.paths import open_folder
from potstill.storage.store.finding import Finding
from potstill.storage.store.survey import Progress, survey_store
from potstill.storage.store.who_may_write import warn_of_writers
from potstill.storage.store.writer import load_spec


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was checked and what is wrong; `findings` is empty for a sound store, and has one for each bad unit.

    `bytes_checked`: whether the seal read the units back; None where no seal says so (older ones, none).
    """

    url: str
    sealed: bool
    bytes_checked: bool | None
    deep: bool
    num_units: int
    num_rows: int
    num_bytes: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return not self.findings

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each finding."""
        return tuple(finding.text for finding in self.findings)

    def format(self) -> str:
        """Text for a terminal."""
        depth = "every row decoded" if self.deep else "sizes, records and index only"
        head = f"{self.num_units} units, {self.num_rows} rows, {self.num_bytes} bytes checked ({depth}): "
        head += "sound" if self.ok else f"{len(self.findings)} problems"
        state = "sealed" if self.sealed else "not sealed"
        if self.bytes_checked is False and not self.deep:
            state += " with --fast: nobody has read the units back since they were written; --deep does"
        lines = [f"{head}; {state}", *(f"  {problem}" for problem in self.problems)]
        if any(finding.part not in ("signature", "store") for finding in self.findings):
            lines.append(f"to make it whole: potstill repair {self.url}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The shape that docs/format.md describes."""
        return {
            "store": self.url,
            "ok": self.ok,
            "sealed": self.sealed,
            "bytes_checked": self.bytes_checked,
            "deep": self.deep,
            "num_units": self.num_units,
            "num_rows": self.num_rows,
            "num_bytes": self.num_bytes,
            "findings": [finding.to_json() for finding in self.findings],
        }


def verify_store(
    path: StorePath, *, deep: bool, progress: Progress | None = None, also: Sequence[Finding] = ()
) -> VerifyReport:
    """Check sizes, records, index and manifest; `deep` adds the sha256 of every file and decodes every row.

    Raises StoreError only when run.json cannot be read; all other damage is a finding, one for each unit. `progress` is
    called with the number of rows just checked; `also` are findings of others, put behind ours.
    """
    folder = open_folder(path)
    spec = load_spec(folder)
    survey = survey_store(folder, spec, deep=deep, progress=progress)
    warn_of_writers(folder, [record.file for record in survey.records.values()])
    return VerifyReport(
        url=folder.url,
        sealed=survey.sealed,
        bytes_checked=None if survey.manifest is None else survey.manifest.bytes_checked,
        deep=deep,
        num_units=len(survey.records),
        num_rows=survey.num_rows,
        num_bytes=survey.num_bytes,
        findings=(*survey.findings, *also),
    )


def rows_to_verify(path: StorePath) -> int:
    """About how many rows `verify_store` will look at, for a progress bar: no record is read. Raises StoreError."""
    folder = open_folder(path)
    spec = load_spec(folder)
    listed = len(list_records(folder, spec)) * spec.rows_per_unit
    return listed if spec.num_rows is None else min(listed, spec.num_rows)
