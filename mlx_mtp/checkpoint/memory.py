"""What a pair needs and what the device has, compared before anything is read."""

from __future__ import annotations

import mlx.core as mx

from mlx_mtp.config import SLIDING, TextConfig
from mlx_mtp.device import WORKING_SPACE
from mlx_mtp.errors import MemoryBudgetError
from mlx_mtp.kv_cache import GROW_STEP, layer_shapes, round_up

GB = 1e9
MIN_CONTEXT = 256  # the least that is worth advising, and the step of advice


def cache_bytes(config: TextConfig, context: int, slack: int, dtype: mx.Dtype) -> int:
    """Bytes of one row's K/V at `context` tokens; sliding layers stop growing at their window."""
    return sum(
        shape.numbers_per_position * (config.window + slack if shape.kind == SLIDING else context) * dtype.size
        for shape in layer_shapes(config).values()
    )


def check_memory(config: TextConfig, weight_bytes: int, context: int, slack: int, dtype: mx.Dtype, budget: int) -> None:
    """Raises MemoryBudgetError, with what would fit instead, if weights and one row's cache exceed `budget` bytes."""
    usable = budget * (1 - WORKING_SPACE)
    cache = cache_bytes(config, round_up(context + slack, GROW_STEP), slack, dtype)
    if weight_bytes + cache <= usable:
        return
    message = (f"the model needs {(weight_bytes + cache) / GB:.1f} GB (weights {weight_bytes / GB:.1f}, cache for "
               f"{context} tokens {cache / GB:.1f}), but the device has {usable / GB:.1f} GB for them: ")
    per_token = (cache_bytes(config, 2, slack, dtype) - cache_bytes(config, 1, slack, dtype)) or 1
    room = usable - weight_bytes - cache_bytes(config, 0, slack, dtype)
    fitting = (int(room / per_token) // GROW_STEP * GROW_STEP - slack) // MIN_CONTEXT * MIN_CONTEXT
    if fitting >= MIN_CONTEXT:
        raise MemoryBudgetError(message + f"a context of {fitting} tokens would fit (--max-context)")
    least = cache_bytes(config, round_up(min(context, MIN_CONTEXT) + slack, GROW_STEP), slack, dtype)
    share = int(100 * (usable - least) / weight_bytes)
    if share < 1:
        raise MemoryBudgetError(message + "use a smaller model")
    raise MemoryBudgetError(message + f"use a checkpoint with at most {share}% of this one's bytes (a quantized one), "
                                      f"and a context of {MIN_CONTEXT} tokens to begin with (--max-context)")
