"""Shards written while they are read: a chunk is read, one is quantized and one is written at any moment.

Every tensor's place in its file is known beforehand, so rows go straight to it and nothing is gathered in memory.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_mtp.convert.jobs import Job
from mlx_mtp.convert.shards import Shard

CHUNK_BYTES = 32 * 2**20  # read or written at a time; the chunks on the way are a few times that
CACHE_BYTES = 128 * 2**20  # of freed arrays that MLX may keep while converting
AHEAD = 2
PART_SUFFIX = ".part"


@dataclass(frozen=True)
class Piece:
    """Rows start .. stop of a job; `shard` is the file it goes to."""

    shard: Shard
    job: Job
    start: int
    stop: int


def write_shards(
    shards: Sequence[Shard], folder: Path, check_finite: bool = True, advance: Callable[[int], None] = lambda _: None
) -> None:
    """Writes shards into `folder`, one after the other; a file has its name only when it is whole and on the disk.

    advance(bytes) is told of the source's bytes that are done. Raises CheckpointError for NaN or infinity (unless
    `check_finite` is off) and for a source that cannot be read, OSError for a target that cannot be written.
    """
    pieces = iter([piece for shard in shards for piece in _pieces(shard)])
    reads: deque[tuple[Piece, Future[list[np.ndarray]]]] = deque()
    writes: deque[Future[None]] = deque()
    file: _ShardFile | None = None
    with _small_cache(), ExitStack() as opened, ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        while True:
            while len(reads) < AHEAD and (upcoming := next(pieces, None)) is not None:
                reads.append((upcoming, reader.submit(_read, upcoming, check_finite)))
            if not reads:
                break
            piece, read = reads.popleft()
            if file is None or file.shard is not piece.shard:
                if file is not None:
                    writes.append(writer.submit(file.finish))
                file = _ShardFile(piece.shard, folder)
                opened.callback(file.close)  # when both threads are done with it, whatever happened
            writes.append(writer.submit(file.write, piece, _converted(piece.job, read.result(), check_finite)))
            while len(writes) > AHEAD:
                writes.popleft().result()
            advance(piece.job.row_bytes * (piece.stop - piece.start))
        if file is not None:
            writes.append(writer.submit(file.finish))
        for write in writes:
            write.result()


def _pieces(shard: Shard) -> Iterator[Piece]:
    for job in shard.jobs:
        rows = job.sources[0].rows
        widest = max(job.row_bytes, job.nbytes // max(rows, 1), 1)
        step = rows if job.action == "tower" else max(1, CHUNK_BYTES // widest)
        for start in range(0, rows, max(step, 1)):
            yield Piece(shard, job, start, min(start + step, rows))


def _read(piece: Piece, check_finite: bool) -> list[np.ndarray]:
    rows = [source.read_raw(piece.start, piece.stop) for source in piece.job.sources]
    if check_finite:
        piece.job.check_finite(rows)
    return rows


def _converted(job: Job, rows: list[np.ndarray], check_finite: bool) -> list[memoryview]:
    """The bytes to write for each output; what is only copied does not pass through MLX."""
    if job.is_plain_copy:
        return [raw.reshape(-1).view(np.uint8).data for raw in rows]
    arrays = job.run(rows)
    if check_finite:
        job.check_dequantized(arrays)
    flat = [array.reshape(-1).view(mx.uint8) for array in arrays]
    mx.eval(flat)
    return [np.asarray(array).data for array in flat]


class _ShardFile:
    """A file being written: `<name>.part` until `finish`."""

    def __init__(self, shard: Shard, folder: Path) -> None:
        self.shard = shard
        self._path = folder / shard.name
        self._part = folder / (shard.name + PART_SUFFIX)
        self._file = self._part.open("wb", buffering=0)
        _write_all(self._file.fileno(), memoryview(shard.header), 0)

    def write(self, piece: Piece, rows: Sequence[memoryview]) -> None:
        share = piece.job.sources[0].rows
        for output, content in zip(piece.job.outputs, rows, strict=True):
            row_bytes = output.nbytes // share
            _write_all(self._file.fileno(), content, self.shard.offsets[output.name] + piece.start * row_bytes)

    def close(self) -> None:
        self._file.close()

    def finish(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        os.rename(self._part, self._path)


def _write_all(descriptor: int, content: memoryview, offset: int) -> None:
    while content:
        count = os.pwrite(descriptor, content, offset)
        content, offset = content[count:], offset + count


@contextmanager
def _small_cache() -> Iterator[None]:
    before = mx.set_cache_limit(CACHE_BYTES)
    try:
        yield
    finally:
        mx.clear_cache()
        mx.set_cache_limit(before)
