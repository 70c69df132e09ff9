"""Jobs -> the files they are written to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_mtp.convert.jobs import Job
from mlx_mtp.convert.safetensors import encode_header

SHARD_BYTES = 5_000_000_000
METADATA = {"format": "mlx"}


@dataclass(frozen=True)
class Shard:
    """One file: its name, what is in it, its first bytes, and where each tensor begins."""

    name: str
    jobs: tuple[Job, ...]
    header: bytes
    offsets: dict[str, int]
    nbytes: int


def into_shards(jobs: Sequence[Job]) -> tuple[Shard, ...]:
    """Fills files of at most SHARD_BYTES in the jobs' order; a module is never split: a huge one exceeds that alone."""
    groups: list[list[Job]] = [[]]
    size = 0
    for job in jobs:
        if groups[-1] and size + job.nbytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(job)
        size += job.nbytes
    names = ["model.safetensors"] if len(groups) == 1 else [
        f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))
    ]
    shards = []
    for name, group in zip(names, groups, strict=True):
        header, offsets, nbytes = encode_header([output for job in group for output in job.outputs], METADATA)
        shards.append(Shard(name, tuple(group), header, offsets, nbytes))
    return tuple(shards)
