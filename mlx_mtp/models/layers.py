"""The small parts every layer is made of: norms, gated MLP, rotary embedding, soft-cap, scaled embedding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.config import RotaryConfig


def fused(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """One kernel for an element-wise function where that needs no compiler on the user's machine.

    On a GPU MLX compiles at run time by itself; on CPU it would call the system's C++ compiler, which may be missing.
    """
    compiled = mx.compile(function, shapeless=True)

    def call(*arrays: mx.array) -> mx.array:
        return compiled(*arrays) if mx.default_device().type == mx.DeviceType.gpu else function(*arrays)

    return call


@fused
def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up with the tanh approximation ("gelu_pytorch_tanh")."""
    return nn.gelu_approx(gate) * up


@fused
def _softcap(logits: mx.array, cap: mx.array) -> mx.array:
    return mx.tanh(logits / cap) * cap


def softcap(logits: mx.array, cap: float | None) -> mx.array:
    """cap * tanh(logits / cap), or the logits themselves where the model has no cap."""
    return logits if cap is None else _softcap(logits, mx.array(cap, logits.dtype))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 inside. The weight is the factor itself, not 1 + weight as in Gemma 1 to 3."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((width,))
        self._eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight, self._eps)


class GatedMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


def rotary_frequencies(config: RotaryConfig) -> mx.array:
    """Periods `theta^(2i / head_dim) * factor` for mx.fast.rope: [head_dim / 2], infinite where nothing turns.

    Source: transformers' "default" and "proportional" rope; the exponent runs over head_dim in both.
    """
    rotated = config.rotated_dims // 2
    exponents = mx.arange(0, config.rotated_dims, 2, dtype=mx.float32) / config.head_dim
    still = mx.full((config.head_dim // 2 - rotated,), float("inf"))
    return mx.concatenate([config.factor * config.theta**exponents, still])


class Rotary:
    """Turns queries and keys of one attention kind. Holds no weights."""

    def __init__(self, config: RotaryConfig) -> None:
        self._rope = partial(mx.fast.rope, dims=config.head_dim, traditional=False, base=None, scale=1.0)
        self._periods = rotary_frequencies(config)

    def __call__(self, x: mx.array, offset: mx.array) -> mx.array:
        """x: [B, heads, L, head_dim]; offset: [B], each row's position of its first token."""
        return self._rope(x, offset=offset, freqs=self._periods)


def embed_scaled(table: nn.Embedding, tokens: mx.array, width: int) -> mx.array:
    """Embedding times sqrt(width): tokens [...] -> [..., width]. Works for plain and quantized tables.

    The scale takes the embedding's dtype first, as in the reference: sqrt(1536) is 39.25 in bfloat16.
    """
    x = table(tokens)
    return x * mx.array(width**0.5, x.dtype)
