"""Attention over keys and values that it is handed: it knows nothing of caches."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.config import LayerConfig, TextConfig
from mlx_mtp.models.layers import RMSNorm, Rotary


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

    def keys_values(self, x: mx.array, rotary: Rotary, offset: mx.array) -> tuple[mx.array, mx.array]:
        """x: [B, L, D], offset: [B] -> keys and values, each [B, kv heads, L, head_dim], keys rotated.

        Where K = V, the values are the keys' projection before its norm and rotation, normalised without a weight.
        """
        batch, length, _ = x.shape
        shape = (batch, length, self._kv_heads, self._head_dim)
        keys = self.k_proj(x).reshape(shape)
        values = keys if self._k_equals_v else self.v_proj(x).reshape(shape)
        keys = rotary(self.k_norm(keys).transpose(0, 2, 1, 3), offset)
        return keys, mx.fast.rms_norm(values, None, self._eps).transpose(0, 2, 1, 3)

    def __call__(
        self, x: mx.array, keys: mx.array, values: mx.array, mask: mx.array, rotary: Rotary, offset: mx.array
    ) -> mx.array:
        """x: [B, L, D], keys/values: [B, kv heads, S, head_dim], mask: [B, 1, L, S], offset: [B] -> [B, L, D]."""
        batch, length, _ = x.shape
        queries = self.q_norm(self.q_proj(x).reshape(batch, length, self._heads, self._head_dim))
        queries = rotary(queries.transpose(0, 2, 1, 3), offset)
        out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=mask)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))
