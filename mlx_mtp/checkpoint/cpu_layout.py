"""How float32 matrices lie in a CPU's memory: as its products read them fastest. Shapes and values stay.

Products call BLAS. Experts' are of single rows, for which OpenBLAS reads a matrix in place, and two things count then:
whether it lies row by row or column by column, and whether it begins where a cache line does (bench/LOG.md). What is
larger or has more rows is repacked first, whatever it looks like.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_mtp.models.moe import ExpertLinear
from mlx_mtp.models.target import Target
from mlx_mtp.models.vector_math import lacks_fast_kernels

SMALL_MATRIX = 2**19  # numbers; below it a transposed layout is faster on CPU, above it slower with OpenBLAS
LONG_ROW, FEW_NUMBERS, MANY_NUMBERS = 512, 2**16, 2**20  # of an expert's matrix, see `lies_by_rows`
CACHE_LINE = 64  # bytes, as many as the widest vector register


def lay_out_for_cpu(model: nn.Module) -> None:
    """Lays small dense float32 matrices out column by column, experts' as `lies_by_rows` says; reads the latter now.

    Small dense ones, measured with 1 to 16 rows: 25 to 40% faster with the reference BLAS, up to 4 times with OpenBLAS.
    """
    for path, module in model.named_modules():
        if not isinstance(module, ExpertLinear | nn.Linear | nn.Embedding) or not lacks_fast_kernels(module.weight):
            continue
        is_head = path == "embed_tokens" and isinstance(model, Target)
        if isinstance(module, ExpertLinear):
            by_rows = lies_by_rows(*module.weight.shape[1:])
            module.weight = on_cache_line(module.weight) if by_rows else _by_columns(module.weight)
        elif (is_head or type(module) is nn.Linear) and module.weight.size <= SMALL_MATRIX:
            module.weight = mx.contiguous(module.weight.T).T


def lies_by_rows(outputs: int, inputs: int) -> bool:
    """Whether an expert's matrix, [outputs, inputs], does: long rows, of which OpenBLAS's kernels with AVX-512 take the
    dot products up to 1.8 times as fast as they add columns up. Else it is these that are faster, up to 2 times."""
    return inputs >= LONG_ROW and FEW_NUMBERS < outputs * inputs < MANY_NUMBERS


def _by_columns(matrices: mx.array) -> mx.array:
    return on_cache_line(matrices.swapaxes(-1, -2)).swapaxes(-1, -2)


def on_cache_line(array: mx.array) -> mx.array:
    """A contiguous copy that begins where a cache line does. What MLX allocates begins 8 or 24 bytes behind that."""
    room = mx.zeros((array.size + CACHE_LINE // array.itemsize,), array.dtype)
    mx.eval(room)
    start = -np.array(room, copy=False).ctypes.data % CACHE_LINE // array.itemsize
    room[start : start + array.size] = array.flatten()  # in place, since nothing else holds it
    copy = room[start : start + array.size].reshape(array.shape)
    mx.eval(copy)
    return copy
