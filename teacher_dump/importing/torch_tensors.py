"""Tensors out of a file of `torch.save`, without torch and without running anything that the file brings.

The file is a zip: `data.pkl` lists the tensors, `data/N` are their bytes. Unpickling runs what a pickle names. Here the
instructions of the pickle are looked through first, and only the few that lists of tensors need may be there; the
unpickler knows the names of tensors and refuses every other before it is looked up; what the names stand for are
objects of this module, not of torch.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

# Storages and types of torch by the dtype of their bytes; bfloat16 has none in NumPy and stays as its 16 bits.
BFLOAT16 = "bfloat16"
STORAGES = {
    "HalfStorage": "float16",
    "BFloat16Storage": BFLOAT16,
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
}
DTYPES = ("uint16", "uint32", "uint64")  # types without a storage of their own
_MAX_PICKLE_BYTES = 1 << 26  # a list of tensors is small
_MAX_MEMO = 1 << 20
# What torch.save (protocol 2) writes for maps and lists of tensors, texts and numbers. None of these sets the state of
# an object, makes one of a class, or reserves memory of a size that the file names.
_INSTRUCTIONS = {
    *("PROTO", "STOP", "MARK", "POP"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"),
    *("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("APPEND", "APPENDS", "SETITEM", "SETITEMS"),
    *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("GLOBAL", "BINPERSID", "REDUCE"),
}


class UnsafeFileError(Exception):
    """The file is not a plain file of tensors; the text says what it asked for."""


@dataclass(frozen=True)
class _Name:
    """What an allowed name of the pickle stands for."""

    name: str

    def __call__(self, *arguments: Any) -> Any:
        if self.name not in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            raise UnsafeFileError(f"it calls {self.name}")
        return _Tensor.of(arguments, has_dtype=self.name == "_rebuild_tensor_v3")


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str | None


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage: offset, sizes and strides in items."""

    storage: _Storage
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, arguments: tuple[Any, ...], *, has_dtype: bool) -> _Tensor:
        if len(arguments) < 6 + has_dtype or not isinstance(arguments[0], _Storage):
            raise UnsafeFileError(f"a tensor of {len(arguments)} parts")
        storage, offset, sizes, strides = arguments[:4]
        named = arguments[6].name if has_dtype and isinstance(arguments[6], _Name) else storage.dtype
        if not isinstance(named, str) or named in ("UntypedStorage", ""):
            raise UnsafeFileError(f"a tensor of the type {named}")
        whole = [offset, *sizes, *strides] if isinstance(sizes, tuple) and isinstance(strides, tuple) else []
        if not whole or len(sizes) != len(strides) or any(type(n) is not int or n < 0 for n in whole):
            raise UnsafeFileError("a tensor whose sizes and strides are no whole numbers")
        return cls(storage, offset, sizes, strides, named)


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        allowed = {
            "torch._utils": {"_rebuild_tensor_v2", "_rebuild_tensor_v3"},
            "torch": {*STORAGES, *DTYPES},
            "torch.storage": {"UntypedStorage"},
        }
        if name not in allowed.get(module, set()):
            raise UnsafeFileError(f"it asks for {module}.{name}, which is no part of a tensor")
        return _Name(name)

    def persistent_load(self, pid: Any) -> Any:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _Name)):
            raise UnsafeFileError("it refers to something that is no storage")
        return _Storage(str(pid[2]), STORAGES.get(pid[1].name))


def load_tensors(data: bytes) -> Any:
    """The object that was saved, lists and maps of tensors as NumPy arrays; bfloat16 comes as float32.

    Raises UnsafeFileError where the pickle names anything but tensors, and where the file is damaged.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return _load(archive)
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, KeyError, ValueError, OverflowError) as error:
        raise UnsafeFileError(f"it is damaged ({error})") from error
    except (AttributeError, IndexError, TypeError, RuntimeError, zlib.error) as error:
        # What reading raises where instructions of the pickle, or flags of the zip, make no sense.
        raise UnsafeFileError(f"it makes no sense ({error})") from error


def _load(archive: zipfile.ZipFile) -> Any:
    names = archive.namelist()
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1 or archive.getinfo(pickles[0]).file_size > _MAX_PICKLE_BYTES:
        raise UnsafeFileError("it holds no single list of tensors (data.pkl)")
    folder = pickles[0].removesuffix("data.pkl")
    order = archive.read(f"{folder}byteorder").strip() if f"{folder}byteorder" in names else b"little"
    if order != b"little":
        raise UnsafeFileError(f"its byte order is {order.decode(errors='replace')}, expected little")
    listing = archive.read(pickles[0])
    _check_instructions(listing)
    return _arrays(_TensorUnpickler(io.BytesIO(listing)).load(), archive, folder, {})


def _check_instructions(listing: bytes) -> None:
    for instruction, argument, _ in pickletools.genops(listing):
        if instruction.name not in _INSTRUCTIONS:
            raise UnsafeFileError(f"its pickle has the instruction {instruction.name}, which no list of tensors needs")
        if instruction.name in ("LONG_BINPUT", "LONG_BINGET") and int(argument or 0) >= _MAX_MEMO:
            raise UnsafeFileError(f"its pickle keeps an object number {argument}")


def _arrays(value: Any, archive: zipfile.ZipFile, folder: str, seen: dict[str, bytes]) -> Any:
    if isinstance(value, _Tensor):
        return _array(value, archive, folder, seen)
    if isinstance(value, dict):
        return {key: _arrays(item, archive, folder, seen) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_arrays(item, archive, folder, seen) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise UnsafeFileError(f"it holds a {type(value).__name__}")


def _array(tensor: _Tensor, archive: zipfile.ZipFile, folder: str, seen: dict[str, bytes]) -> np.ndarray:
    key = tensor.storage.key
    if not key.isdigit():
        raise UnsafeFileError(f"a storage named {key!r}")
    if key not in seen:
        seen[key] = archive.read(f"{folder}data/{key}")
    dtype = np.dtype("uint16" if tensor.dtype == BFLOAT16 else tensor.dtype).newbyteorder("<")
    flat = np.frombuffer(seen[key], dtype, count=len(seen[key]) // dtype.itemsize)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.sizes, tensor.strides, strict=True))
    if 0 in tensor.sizes:
        return np.zeros(tensor.sizes, np.float32 if tensor.dtype == BFLOAT16 else dtype)
    if last >= len(flat) or math.prod(tensor.sizes) > len(flat):
        raise UnsafeFileError(f"a tensor of sizes {tensor.sizes} in a storage of {len(flat)} items")
    strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
    view = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.sizes, strides, writeable=False)
    if tensor.dtype == BFLOAT16:
        return (np.ascontiguousarray(view).astype(np.uint32) << 16).view(np.float32)
    return view
