"""safetensors files without a memory map: headers read strictly, tensors read and written row by row at their offsets.

A file is eight bytes with the header's length, the header (JSON: for each tensor its type, shape and place), and the
tensors' numbers. Reading with pread keeps resident memory at what was asked for, however large the file is.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

import mlx.core as mx
import numpy as np

from mlx_mtp.errors import CheckpointError

LENGTH_BYTES = 8
LARGEST_HEADER = 100_000_000  # the format's own limit
METADATA = "__metadata__"
DTYPES: Mapping[str, mx.Dtype] = {
    "BOOL": mx.bool_, "U8": mx.uint8, "I8": mx.int8, "U16": mx.uint16, "I16": mx.int16, "U32": mx.uint32,
    "I32": mx.int32, "U64": mx.uint64, "I64": mx.int64, "F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CONTAINERS: Mapping[int, np.dtype[Any]] = {size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet; `offset` is its first byte's place in the file."""

    name: str
    file: Path
    dtype: mx.Dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size

    @property
    def rows(self) -> int:
        """The product of all axes but the last; 1 for a vector or a scalar."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    def read(self, start: int = 0, stop: int | None = None) -> mx.array:
        """Rows start .. stop (all by default) as [stop - start, columns]. Raises CheckpointError if they are gone."""
        return as_array(self.read_raw(start, stop), self.dtype)

    def read_raw(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Like `read`, as unsigned integers of the same width: NumPy has no bfloat16. Fit for any thread."""
        numbers = _unread(self, start, stop)
        self.fill(numbers, start)
        return numbers

    def fill(self, numbers: np.ndarray, start: int) -> None:
        """Reads rows into `numbers` from row `start` on."""
        buffer, done = numbers.reshape(-1).view(np.uint8).data, 0
        offset = self.offset + start * self.columns * self.dtype.size
        try:
            with self.file.open("rb", buffering=0) as file:
                while done < len(buffer):  # one call reads 2 GB at most
                    count = os.preadv(file.fileno(), [buffer[done:]], offset + done)
                    if not count:
                        raise CheckpointError(f"{self.file} ends within tensor {self.name}: it was changed while it "
                                              "was read; start again")
                    done += count
        except OSError as error:
            raise CheckpointError(f"{self.file}: tensor {self.name} cannot be read ({error.strerror}): check the disk, "
                                  "or download the file again") from error


@dataclass(frozen=True)
class HalfTensor:
    """The upper (0) or lower (1) half of a stored tensor along axis -2, read like a tensor of its own."""

    whole: StoredTensor
    half: int

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def file(self) -> Path:
        return self.whole.file

    @property
    def dtype(self) -> mx.Dtype:
        return self.whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        *outer, height, columns = self.whole.shape
        return (*outer, height // 2, columns)

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes // 2

    @property
    def rows(self) -> int:
        return self.whole.rows // 2

    @property
    def columns(self) -> int:
        return self.whole.columns

    def read(self, start: int = 0, stop: int | None = None) -> mx.array:
        """Rows start .. stop of the half, as `StoredTensor.read` gives them."""
        return as_array(self.read_raw(start, stop), self.dtype)

    def read_raw(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start .. stop of the half, as `StoredTensor.read_raw` gives them."""
        numbers, height, done = _unread(self, start, stop), self.shape[-2], 0
        while done < len(numbers):
            block, within = divmod(start + done, height)
            count = min(len(numbers) - done, height - within)
            self.whole.fill(numbers[done : done + count], (2 * block + self.half) * height + within)
            done += count
        return numbers


Readable = StoredTensor | HalfTensor


def _unread(tensor: Readable, start: int, stop: int | None) -> np.ndarray:
    stop = tensor.rows if stop is None else stop
    assert 0 <= start <= stop <= tensor.rows, f"rows {start} to {stop} of {tensor.rows}"
    return np.empty((stop - start, tensor.columns), CONTAINERS[tensor.dtype.size])


def as_array(raw: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """Unsigned integers as what they stand for. Bits are kept: nothing is rounded."""
    return mx.array(raw).view(dtype)


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of a file in the order of their places; no number is read.

    Raises CheckpointError if the file is truncated, its header is no header, two tensors have one name, a type is
    unknown, or the places do not cover the file exactly: a gap, an overlap, a size that its shape does not have.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, LARGEST_HEADER):
                raise CheckpointError(f"{file} is truncated or not a safetensors file: it has {size} bytes, and its "
                                      f"header alone should have {length}; download it again")
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}): check it, or download it again") from error
    entries = _entries(file, text)
    start = LENGTH_BYTES + length
    tensors = sorted((_tensor(file, name, entry, start) for name, entry in entries.items() if name != METADATA),
                     key=lambda tensor: (tensor.offset, tensor.nbytes))
    for before, after in pairwise(tensors):
        if after.offset != before.offset + before.nbytes:
            what = "overlap" if after.offset < before.offset + before.nbytes else "leave a gap"
            raise _lying(file, f"tensors {before.name} and {after.name} {what}")
    first, end = (tensors[0].offset, tensors[-1].offset + tensors[-1].nbytes) if tensors else (start, start)
    if first != start:
        raise _lying(file, f"tensor {tensors[0].name} does not begin where the header ends")
    if end != size:
        what = "truncated" if end > size else "longer than its header says"
        raise CheckpointError(f"{file} is {what}: it has {size} bytes, its header speaks of {end}; download it again")
    return tensors


def _entries(file: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{file}: tensor {twice} is there twice; download the file again")
        return found

    try:
        entries = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a safetensors file: its header is not JSON; download it again") from error
    if not isinstance(entries, dict):
        raise _lying(file, f"it is a {type(entries).__name__}, not an object")
    return entries


def _tensor(file: Path, name: str, entry: object, start: int) -> StoredTensor:
    """A header's entry as a tensor; `start` is where in the file the numbers begin."""
    if not isinstance(entry, dict):
        raise _lying(file, f"the entry of {name} is not an object")
    dtype, shape, place = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{file}: tensor {name} holds {dtype}; expected one of {', '.join(DTYPES)}: convert the "
                              "bfloat16 checkpoint")
    if not _is_whole(shape) or not _is_whole(place) or len(place) != 2:
        raise _lying(file, f"the entry of {name} has no valid shape and data_offsets")
    tensor = StoredTensor(name, file, DTYPES[dtype], tuple(shape), start + place[0])
    if tensor.nbytes != place[1] - place[0]:
        raise _lying(file, f"tensor {name} of {dtype} {list(shape)} has {tensor.nbytes} bytes, its data_offsets "
                           f"{place[1] - place[0]}")
    return tensor


def _is_whole(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**62 for value in values)


def _lying(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file}: its header is not right: {what}; download the file again")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor to be written: what stands in a header about it."""

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


def encode_header(tensors: Sequence[TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """A file's first bytes, each tensor's offset in the file, and the file's size.

    Wider numbers come first, and the header is padded to a multiple of 8 bytes: every tensor lies aligned.
    """
    entries: dict[str, Any] = {METADATA: dict(metadata)}
    offsets, end = {}, 0
    for tensor in sorted(tensors, key=lambda tensor: -tensor.dtype.size):
        offsets[tensor.name], start, end = end, end, end + tensor.nbytes
        entries[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}, len(header) + end
