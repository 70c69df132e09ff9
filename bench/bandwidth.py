"""What bounds decoding: the bytes of weights that a round must read, over what the device reads in a second.

The bound is of weights alone. K/V, activations and logits are read on top of them, so a long context lowers the share.
Experts: the expected number of distinct ones if routing were uniform, each read once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from bench.model_bytes import distinct_experts
from mlx_mtp import Pair
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target

PROBE_BYTES = 2**28  # beyond the caches
REPEATS = 5
LOOKED_UP = "embed_tokens_per_layer"  # a few rows of it are read, never all


@dataclass(frozen=True)
class Bandwidth:
    """GB/s (10^9 bytes) of the two probes, each the best of a few: an addition to every number (read and written), and
    a matrix times a vector (read), which is what decoding does."""

    copy: float
    matvec: float

    @property
    def best(self) -> float:
        return max(self.copy, self.matvec)


def measure_bandwidth(dtype: mx.Dtype, nbytes: int = PROBE_BYTES) -> Bandwidth:
    """Reads `nbytes` of `dtype` numbers as often as it takes to trust the best time."""
    width = 4096
    matrix = mx.ones((nbytes // dtype.size // width, width), dtype)
    vector, one = mx.ones((width, 1), dtype), mx.array(1, dtype)
    mx.eval(matrix, vector, one)
    copy = _fastest(lambda: matrix + one)
    matvec = _fastest(lambda: matrix @ vector)
    mx.clear_cache()
    return Bandwidth(2 * matrix.nbytes / copy / 1e9, matrix.nbytes / matvec / 1e9)


def _fastest(work: Callable[[], mx.array]) -> float:
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        mx.eval(work())
        times.append(time.perf_counter() - start)
    return min(times[1:])


def weight_bytes(pair: Pair, rows: int, num_draft_tokens: float) -> float:
    """Bytes of weights that a round of `rows` rows must read: one target pass over K + 1 tokens a row, K drafter steps.

    num_draft_tokens: K, or its mean where it changes.
    """
    total = target_bytes(pair.target, rows * (num_draft_tokens + 1))
    if num_draft_tokens and isinstance(pair.drafter, Drafter):
        total += num_draft_tokens * drafter_bytes(pair.drafter, rows)
    return total


def target_bytes(target: Target, tokens: float) -> float:
    """Of one pass with its head over so many tokens."""
    experts = target.config.text.experts
    share = 1.0
    if experts is not None:
        share = distinct_experts(experts.num_experts, experts.top_k, tokens) / experts.num_experts
    return sum(array.nbytes * (share if ".switch_glu." in path else 1)
               for path, array in _parameters(target) if not path.startswith(LOOKED_UP))


def drafter_bytes(drafter: Drafter, rows: int) -> float:
    """Of one step. A centroid head reads its clusters' tokens, which rows choose apart, and not the whole embedding."""
    centroids = drafter.config.centroids
    share = 1.0 if centroids is None else min(1.0, rows * centroids.top_k / centroids.num_centroids)
    return sum(array.nbytes * (share if path.startswith("embed_tokens.") else 1)
               for path, array in _parameters(drafter) if not path.endswith("token_ordering"))


def _parameters(model: nn.Module) -> list[tuple[str, mx.array]]:
    return list(tree_flatten(model.parameters()))
