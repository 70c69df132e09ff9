"""The device that models run on: whether it is a GPU, what it can hold, and keeping weights resident on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

WORKING_SPACE = 0.05  # of the device's memory: activations, logits, masks
VECTOR_HEAD_DIM = 256  # the widest heads that Metal's vector attention kernel takes with a mask of ours
MOST_LANES = 4


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


# Handles only: MLX starts a queue's thread when it first gets work.
_SIDE_LANES = tuple(mx.new_thread_local_stream(mx.cpu) for _ in range(min(_cores(), MOST_LANES) - 1))


def side_lanes() -> tuple[mx.ThreadLocalStream, ...]:
    """Queues whose work runs beside that of the default one: on a CPU one for each further core, on a GPU none.

    MLX runs a CPU queue's operations one after the other, most of them on one core: what is independent can be shared
    out. A GPU needs no such help.
    """
    return () if is_gpu() else _SIDE_LANES


def is_gpu() -> bool:
    """Whether the default device is a GPU. A Mac has one and can still be told to use its CPU."""
    return mx.default_device().type == mx.DeviceType.gpu


def is_metal() -> bool:
    """Whether the default device is a Mac's GPU."""
    return is_gpu() and mx.metal.is_available()


def memory_bytes() -> int:
    """Bytes that models may take: a GPU's recommended working set or its memory, else the machine's."""
    if is_gpu():
        info = mx.device_info()
        for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
            if key in info:
                return int(info[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def widest_block(heads_per_kv_head: int) -> int | None:
    """Query positions that one row may have for Metal's vector attention kernel to take them; None on other devices.

    MLX's rule: at most 8, and at most 32 together with the query heads that share one key head.
    """
    if not is_metal():
        return None
    return max(1, min(8, 32 // heads_per_kv_head))


def release_unused() -> None:
    """Gives back what a GPU's allocator keeps for arrays of the sizes it has met.

    It reuses a buffer only for an array of nearly its size. Scores grow with the context, so theirs would never be met
    again, and would be kept until they fill the device.
    """
    if is_gpu():
        mx.clear_cache()


@contextmanager
def reading() -> Iterator[None]:
    """What becomes of a file's arrays before they are weights: on a Mac's CPU, which reads them; elsewhere as ever.

    Its GPU would be handed work that waits for the disk, and macOS resets a GPU that waits for some seconds.
    """
    if not is_metal():
        yield
        return
    with mx.stream(mx.cpu):
        yield


@contextmanager
def wired_memory() -> Iterator[None]:
    """Keeps weights and caches resident for the time of a generation, on a Mac's GPU; elsewhere there is no need."""
    if not is_metal():
        yield
        return
    before = mx.set_wired_limit(memory_bytes())
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(before)
