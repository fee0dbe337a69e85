"""DistillKit's two codecs of top-k log-probabilities, decoded as its own readers decode them.

Source: arcee-ai/DistillKit, distillkit/compression (commit a61c2e7): `DistributionQuantizationConfig` (current) and
`LegacyLogitCompressionConfig`. Nothing in the data says which settings were used: they come from the writer's
compression_config.yaml. Legend: P positions, k entries of each, m = k - exact_k fitted ones.
"""

from __future__ import annotations

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from potstill.common.config import StrictModel
from potstill.teacher_dump.records.base import BadRecord

FloatName = Literal["float16", "bfloat16", "float32", "float64"]
_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
MAX_K = 1 << 12


class ResidualBin(StrictModel):
    """One scale and `num_elements` whole numbers of `element_bits` bits: what the fit missed of as many entries."""

    scale_dtype: FloatName
    element_bits: int = Field(gt=0, le=48)
    num_elements: int = Field(gt=0)

    @property
    def num_bytes(self) -> int:
        return _ITEM_BYTES[self.scale_dtype] + -(-self.element_bits * self.num_elements // 8)


class CurrentCodec(StrictModel):
    """compression_config.yaml of the current codec; names and defaults are those of DistillKit."""

    d: int = Field(gt=1)
    k: int = Field(gt=0, le=MAX_K)
    exact_k: int = Field(ge=0)
    exact_dtype: FloatName = "float32"
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = None
    term_dtype: FloatName = "float32"
    residual_bins: list[ResidualBin]
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.exact_k > self.k:
            raise ValueError(f"exact_k {self.exact_k} is above k {self.k}")
        if sum(one.num_elements for one in self.residual_bins) > self.k - self.exact_k:
            raise ValueError("residual_bins hold more elements than there are fitted entries (k - exact_k)")
        return self

    @property
    def id_bits(self) -> int:
        return (self.d - 1).bit_length()

    @property
    def num_value_bytes(self) -> int:
        terms = len(self.polynomial_terms or []) * _ITEM_BYTES[self.term_dtype]
        bins = sum(one.num_bytes for one in self.residual_bins)
        return self.exact_k * _ITEM_BYTES[self.exact_dtype] + terms + bins

    def ids(self, packed: np.ndarray) -> np.ndarray:
        """Ids int64 [P, k] from bytes uint8 [P, ..]: id_bits each, most significant bit first, no gap."""
        wanted = -(-self.k * self.id_bits // 8)
        if packed.shape[1] != wanted:
            raise BadRecord(f"bytepacked_indices has {packed.shape[1]} bytes a position, k and d make {wanted}")
        return unpack_bits(packed, count=self.k, bits=self.id_bits)

    def values(self, packed: np.ndarray) -> np.ndarray:
        """Log-probabilities float64 [P, k] from bytes uint8 [P, num_value_bytes], in the order of the ids."""
        if packed.shape[1] != self.num_value_bytes:
            raise BadRecord(
                f"compressed_logprobs has {packed.shape[1]} bytes a position, the settings make {self.num_value_bytes}"
            )
        exact, packed = _cut_floats(packed, self.exact_k, self.exact_dtype)
        terms = self.polynomial_terms or []
        coefficients, packed = _cut_floats(packed, len(terms), self.term_dtype)
        fitted = coefficients @ self._basis()
        start = 0
        for one in self.residual_bins:
            residuals, packed = _cut_residuals(packed, one)
            fitted[:, start : start + one.num_elements] += residuals
            start += one.num_elements
        joined = np.concatenate([exact, fitted], axis=1)
        if not self.delta_encoding:
            return joined
        with np.errstate(invalid="ignore"):
            values = np.cumsum(joined, axis=1)
        # A rank that the sampler did not return is -inf, and the difference between two such is NaN.
        values[np.maximum.accumulate(np.isneginf(values), axis=1)] = -np.inf
        return values

    def _basis(self) -> np.ndarray:
        """Terms [len(terms), m] at t = 0 .. m - 1, or at m even steps from 0 to 1."""
        m = self.k - self.exact_k
        t = np.linspace(0.0, 1.0, m) if self.normalize_t else np.arange(m, dtype=np.float64)
        special = {"sqrt": np.sqrt, "exp": np.exp}
        with np.errstate(divide="ignore", over="ignore"):
            rows = [
                special[term](t) if isinstance(term, str) else t ** float(term) for term in self.polynomial_terms or []
            ]
        return np.stack(rows) if rows else np.zeros((0, m))


class LegacyCodec(StrictModel):
    """compression_config.yaml of the codec before, in which published sets of logits are."""

    k: int = Field(gt=0, le=MAX_K)
    exact_k: int = Field(ge=0)
    polynomial_degree: int = Field(ge=0, le=64)
    vocab_size: int = Field(gt=1)
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: FloatName = "float32"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.exact_k > self.k:
            raise ValueError(f"exact_k {self.exact_k} is above k {self.k}")
        return self

    @property
    def id_bits(self) -> int:
        return (self.vocab_size - 1).bit_length()

    def ids(self, words: np.ndarray) -> np.ndarray:
        """Ids int64 [P, k] from words uint64 [P, ..]: 64 // id_bits ids a word, the first in the lowest bits."""
        per_word = 64 // self.id_bits
        wanted = -(-self.k // per_word)
        if words.shape[1] != wanted:
            raise BadRecord(f"packed_indices has {words.shape[1]} words a position, k and vocab_size make {wanted}")
        shifts = (np.arange(per_word) * self.id_bits).astype(np.uint64)
        mask = np.uint64((1 << self.id_bits) - 1)
        ids = (words.astype(np.uint64)[:, :, None] >> shifts) & mask
        return ids.reshape(len(words), -1)[:, : self.k].astype(np.int64)

    def values(self, exact: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """Values float64 [P, k]: the exact ones, and the polynomial at 1 .. m (in 1/a if it is inverted)."""
        wanted = self.polynomial_degree + 1 + self.with_sqrt_term
        if exact.shape[1] != self.exact_k or coefficients.shape[1] != wanted:
            raise BadRecord(
                f"exact_values and coeffs have {exact.shape[1]} and {coefficients.shape[1]} numbers a position, the "
                f"settings make {self.exact_k} and {wanted}"
            )
        a = np.arange(1, self.k - self.exact_k + 1, dtype=np.float64)
        sign = -1.0 if self.invert_polynomial else 1.0
        rows = [a ** (sign * power) for power in range(self.polynomial_degree + 1)]
        rows += [np.sqrt(a)] if self.with_sqrt_term else []
        return np.concatenate([exact.astype(np.float64), coefficients.astype(np.float64) @ np.stack(rows)], axis=1)


def unpack_bits(packed: np.ndarray, *, count: int, bits: int) -> np.ndarray:
    """Whole numbers int64 [P, count] of `bits` bits each from bytes uint8 [P, ..], most significant bit first."""
    if bits > 24:
        flat = np.unpackbits(packed, axis=1, count=count * bits).reshape(len(packed), count, bits)
        return flat.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))
    # Four bytes hold any number of up to 25 bits, wherever it begins in the first.
    first = np.arange(count) * bits
    padded = np.pad(packed, ((0, 0), (0, 3)))
    window = np.zeros((len(packed), count), np.uint32)
    for place in range(4):
        window = (window << np.uint32(8)) | padded[:, (first >> 3) + place]
    shift = (32 - bits - (first & 7)).astype(np.uint32)
    return ((window >> shift) & np.uint32((1 << bits) - 1)).astype(np.int64)


def floats(raw: np.ndarray, dtype: str) -> np.ndarray:
    """float64 [P, n] from little-endian bytes uint8 [P, n * item]."""
    contiguous = np.ascontiguousarray(raw)
    if dtype == "bfloat16":
        return (contiguous.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return contiguous.view(np.dtype(dtype).newbyteorder("<")).astype(np.float64)


def _cut_floats(packed: np.ndarray, count: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` numbers of each position as float64 [P, count], and the bytes after them."""
    size = count * _ITEM_BYTES[dtype]
    if not count:
        return np.zeros((len(packed), 0)), packed
    return floats(packed[:, :size], dtype), packed[:, size:]


def _cut_residuals(packed: np.ndarray, one: ResidualBin) -> tuple[np.ndarray, np.ndarray]:
    scale, rest = _cut_floats(packed, 1, one.scale_dtype)
    size = one.num_bytes - _ITEM_BYTES[one.scale_dtype]
    codes = unpack_bits(rest[:, :size], count=one.num_elements, bits=one.element_bits)
    signed = 2 * codes - 1 if one.element_bits == 1 else codes - (1 << (one.element_bits - 1))
    return signed * scale, rest[:, size:]
