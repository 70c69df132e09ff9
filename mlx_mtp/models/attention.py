"""Attention over keys and values that it is handed: it knows nothing of caches.

Everything but attention treats each token alone, so layers work on [N, D] with N = B * L tokens, row by row.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.config import LayerConfig, TextConfig
from mlx_mtp.models.layers import RMSNorm, Turn, rms_norm
from mlx_mtp.models.vector_math import lacks_fast_kernels, softmax


class Mask:
    """Who sees whom in one pass, for all layers of one kind: [B, 1, L, S] booleans, true where a key is seen."""

    def __init__(self, seen: mx.array) -> None:
        self.seen = seen
        self._added: dict[int, mx.array] = {}

    def added(self, repeats: int, dtype: mx.Dtype) -> mx.array:
        """The same as numbers to add to scores: [B, 1, repeats * L, S], once for each query head of a kv head."""
        if repeats not in self._added:
            numbers = mx.where(self.seen, mx.array(0.0, dtype), mx.array(-float("inf"), dtype))
            self._added[repeats] = mx.tile(numbers, (1, 1, repeats, 1))
        return self._added[repeats]


def attend(queries: mx.array, keys: mx.array, values: mx.array, mask: Mask) -> mx.array:
    """Softmax attention of scale 1: queries [B, H, L, d], keys and values [B, G, S, d] -> [B, H, L, d]."""
    if not lacks_fast_kernels(queries):
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=mask.seen)
    groups = keys.shape[1]
    stacked = queries.reshape(queries.shape[0], groups, -1, queries.shape[-1])
    scores = stacked @ keys.swapaxes(-1, -2) + mask.added(queries.shape[1] // groups, queries.dtype)
    return (softmax(scores) @ values).reshape(queries.shape)


class Attention(nn.Module):
    """Grouped-query attention with normalised queries, keys and values, and scale 1.

    K/V of a layer that owns them come from `keys_values`; a layer without them (KV-shared, or a drafter's) has no
    K/V weights at all and is handed its donor's.
    """

    def __init__(self, config: TextConfig, layer: LayerConfig, owns_kv: bool) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, layer.head_dim
        self._heads, self._kv_heads, self._head_dim = config.num_heads, layer.num_kv_heads, head_dim
        self._k_equals_v = layer.k_equals_v
        self._eps = config.rms_norm_eps
        self.q_proj = nn.Linear(hidden, config.num_heads * head_dim, bias=False)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps)
        self.o_proj = nn.Linear(config.num_heads * head_dim, hidden, bias=False)
        if owns_kv:
            self.k_proj = nn.Linear(hidden, layer.num_kv_heads * head_dim, bias=False)
            self.k_norm = RMSNorm(head_dim, config.rms_norm_eps)
            if not layer.k_equals_v:
                self.v_proj = nn.Linear(hidden, layer.num_kv_heads * head_dim, bias=False)

    def keys_values(self, x: mx.array, batch: int, turn: Turn) -> tuple[mx.array, mx.array]:
        """x: [N, D] of `batch` rows -> keys and values, each [B, kv heads, L, head_dim], keys rotated.

        Where K = V, the values are the keys' projection before its norm and rotation, normalised without a weight.
        """
        shape = (batch, -1, self._kv_heads, self._head_dim)
        keys = self.k_proj(x).reshape(shape)
        values = keys if self._k_equals_v else self.v_proj(x).reshape(shape)
        keys = turn(self.k_norm(keys).transpose(0, 2, 1, 3))
        return keys, rms_norm(values, None, self._eps).transpose(0, 2, 1, 3)

    def __call__(self, x: mx.array, keys: mx.array, values: mx.array, mask: Mask, turn: Turn) -> mx.array:
        """x: [N, D]; keys, values: [B, kv heads, S, head_dim]; mask: of [B, 1, L, S] -> [N, D]."""
        queries = self.q_norm(self.q_proj(x).reshape(keys.shape[0], -1, self._heads, self._head_dim))
        out = attend(turn(queries.transpose(0, 2, 1, 3)), keys, values, mask)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(x.shape[0], -1))
